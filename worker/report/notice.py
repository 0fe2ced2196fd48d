"""What people are told at once: that a critical finding is positive. JSON; nothing where none is.

It says which study and what was found, by the study's own numbers; whose study it is stands in the PACS, not here. The e-mail that is made
of it says less still. Not here: how it travels, and that it is signed (deliver/notice.py).
"""

from __future__ import annotations

import hashlib
import json

from worker.domain import Document
from worker.report import content
from worker.report.result import Result


def build(result: Result) -> tuple[Document, ...]:
    """Write the notice, if a finding that the bundle calls critical is positive."""
    critical = [finding for finding in result.findings if finding.is_alarming]
    if not critical:
        return ()
    uid = result.uid("notice")
    notice = {
        "type": "finding.critical",
        # No dots, which separate what a webhook's signature is of.
        "id": hashlib.sha256(uid.encode()).hexdigest()[:32],
        "timestamp": result.analysed_at.isoformat(timespec="milliseconds"),
        "data": {
            "accession_number": result.study.accession_number,
            "study_instance_uid": result.study.study_instance_uid,
            "is_replacement": result.previous is not None,
            "algorithm": {"name": result.algorithm.name, "version": result.algorithm.version},
            "findings": [
                {
                    "name": one.name,
                    "code": {"value": one.code.value, "scheme": one.code.scheme, "meaning": one.code.meaning},
                    "probability_percent": content.percent(one.probability),
                    "threshold_percent": content.percent(one.threshold),
                }
                for one in critical
            ],
            "statement": content.statements(result.algorithm)[0][1],
        },
    }
    return (Document(uid, "", "notice", json.dumps(notice, ensure_ascii=False, separators=(",", ":")).encode()),)
