"""What real viewers show of what we send: OHIF and Orthanc's own viewer in a real browser.

::

    make viewers            fetch OHIF once, then: pytest tests/viewers/ohif.py tests/viewers/webviewer.py

    fetch.py                OHIF's build from npm into var/viewers, by its sha512
    site.py                 one origin that serves OHIF and hands /dicom-web to Orthanc
    browser.py              Debian's Chromium, and what may be asked of OHIF
    cases.py                a study and all documents of its Result, with a painted lesion
    ohif.py, webviewer.py   the tests; no part of the ordinary suite, so they do not begin with test_

Screenshots are left in var/viewers/screenshots, for a person to look at.
"""
