"""What can go wrong, as verdicts: the branch an error sits on says what happens to the job.

::

    WorkerError
    ├── Superseded  not wrong, too late    → cancel; a newer input version has its own job
    ├── Snooze      not wrong, not ready   → wait; the attempt is not counted
    │   └── RecordPending          the patient's record is not here yet
    ├── Retry       the world was wrong    → back off; the attempt is counted
    │   ├── PeerUnavailable        an abort, a time-out, status 0xA7xx
    │   │   └── PeerUnreachable        no connection, no TLS, no association
    │   ├── NotReadBack            Success was answered but the object cannot be found
    │   ├── DecoderDied            the decoding process was killed by its limits
    │   ├── DeviceOutOfMemory      the accelerator is full even for one study
    │   └── DeviceLost             the accelerator answers no more: the process ends, a new one looks for it
    └── Reject      the input is wrong     → discard; tell a person
        ├── PeerRefused            a status that a resend cannot change
        ├── PatientConflict        whose study is this?
        ├── StoredFileLost         our own disk lost or changed what was received, or [retention] removed it: send it again, then retry
        ├── ReportInvalid          what we wrote may not be sent: our fault, and nobody is told anything
        ├── BundleError            weights, digest or metadata are not what they should be
        ├── RecordError            a message or resource that cannot be understood
        │   └── PatientAmbiguous   a server has several patients under one identifier
        └── Unanalysable           the images cannot be analysed: a report says so
            ├── NoSuitableSeries
            ├── OutsideIntendedUse   the patient is not whom the bundle is meant for
            ├── Implausible          the pixels are not what the bundle says it takes
            ├── RecordIncomplete   what the bundle requires of the record did not come in time
            ├── GeometryError
            └── PixelError

Messages are whole sentences with numbers, never a name, a birth date or an identifier.
"""

from __future__ import annotations

import re
import ssl


class WorkerError(Exception):
    """Anything this worker raises on purpose."""


class Superseded(WorkerError):
    """A newer version of the study is queued: this job's answer would be out of date."""


class Snooze(WorkerError):
    """Not wrong, not ready: look again in `delay_s` seconds; no attempt is counted."""

    def __init__(self, message: str, *, delay_s: float) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class RecordPending(Snooze):
    """The patient's record has not arrived and the bundle's waiting time has not passed."""


class Retry(WorkerError):
    """The world was wrong: back off and try again; the attempt is counted."""


class PeerUnavailable(Retry):
    """A peer gave no association, aborted, timed out or was out of resources."""


class PeerUnreachable(PeerUnavailable):
    """A peer was not reached at all: no connection, no TLS or no association. What was to be sent cannot be why."""


class NotReadBack(Retry):
    """The peer answered Success, yet a query does not find the object."""


class DecoderDied(Retry):
    """The decoding process met its memory or time limit."""


class DeviceOutOfMemory(Retry):
    """The accelerator cannot hold even one study now."""


class DeviceLost(Retry):
    """The accelerator failed (reset, fallen off the bus): nothing that this process asks of it will be answered again."""


class Reject(WorkerError):
    """The input is wrong: no attempt will change that; a person must look."""


class PeerRefused(Reject):
    """The peer answered a status that sending again cannot change."""


class PatientConflict(Reject):
    """The images of one study belong to more than one patient."""


class StoredFileLost(Reject):
    """A spool file is missing, removed or not what was received: our doing, which no report may pass on as the study's."""


class ReportInvalid(Reject):
    """A report that we wrote breaks a rule of its kind and may not be sent."""


class BundleError(Reject):
    """A bundle's weights, digest or metadata are not what they should be."""


class RecordError(Reject):
    """A message or resource that cannot be understood; the text says which field."""


class PatientAmbiguous(RecordError):
    """More than one patient has the identifier asked for: nobody may say whose record it is."""


class Unanalysable(Reject):
    """The images cannot be analysed; the report says why."""


class NoSuitableSeries(Unanalysable):
    """No series of the study fits the bundle's rule."""


class OutsideIntendedUse(Unanalysable):
    """The patient's age or sex is not one the bundle is meant for."""


class Implausible(Unanalysable):
    """Pixels that could be read, but cannot be what the bundle takes: another unit, another anatomy, another spacing."""


class RecordIncomplete(Unanalysable):
    """What the bundle requires of the patient's record did not come in its waiting time."""


class GeometryError(Unanalysable):
    """Slices do not form one regular volume."""


class PixelError(Unanalysable):
    """Pixel data are missing, short, undecodable or not plausible."""


def cause_of(error: OSError) -> str:
    """What the system or OpenSSL says of a connection or a PEM file, in words that may follow a colon; no name, no path."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused, {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError) and error.reason:
        alert = re.fullmatch(r"(?:SSL|TLS)V\d+_ALERT_(\w+)", error.reason)
        words = (alert[1] if alert else error.reason).lower().replace("_", " ")
        return f"TLS is refused there, {words}" if alert else f"TLS fails, {words}"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
        return "TLS was cut off there, as by a peer that refuses our certificate"
    words = error.strerror or str(error) or type(error).__name__
    return words.partition(" (_ssl.c")[0]
