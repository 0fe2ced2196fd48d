"""Which transfer syntaxes are decoded, by which module, and why the others are not. Standard library only.

Not here: decoding (samples.py), the processes in which it is done (decoding.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final

#: Transfer syntax (PS3.5 §10, PS3.6 Table A-1) → the module that decodes it; '' needs none. Each is compared with a second decoder
#: in deploy/IMAGES.md. The libjpeg plug-in of pylibjpeg is GPL and not used.
CODECS: Final[Mapping[str, str]] = {
    "1.2.840.10008.1.2": "",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1": "",  # Explicit VR Little Endian
    "1.2.840.10008.1.2.4.50": "gdcm",  # JPEG Baseline, 8 bit
    "1.2.840.10008.1.2.4.51": "gdcm",  # JPEG Extended: 8 bit, see NOT_OFFERED
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG Lossless, selection value 1
    "1.2.840.10008.1.2.4.80": "jpeg_ls",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81": "jpeg_ls",  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.90": "openjpeg",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91": "openjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.201": "openjpeg",  # High-Throughput JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.202": "openjpeg",  # High-Throughput JPEG 2000 Lossless, RPCL
    "1.2.840.10008.1.2.4.203": "openjpeg",  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.5": "rle",  # RLE Lossless
}
#: Decoded when a file comes in it, and not negotiated: GDCM's wheel cannot decode the 12-bit form of JPEG Extended, which is the usual
#: one, and a sender that is not offered it sends another.
NOT_OFFERED: Final = frozenset({"1.2.840.10008.1.2.4.51"})
_VIDEO: Final = "it is video, of which no single frame can be checked against its header"
_JPIP: Final = "its pixels are on another server"
#: Start of the UID of a transfer syntax that is not decoded → why. The longest start counts.
REFUSED: Final[Mapping[str, str]] = {
    "1.2.840.10008.1.2.1.9": "a small file may inflate to any size before its header can be checked",  # Deflated, and .98
    "1.2.840.10008.1.2.2": "it is retired, and no scanner has sent it since 2006",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.4.5": "it is retired",  # .52 to .56, .58, .59: JPEG processes that no product kept
    "1.2.840.10008.1.2.4.6": "it is retired",
    "1.2.840.10008.1.2.4.92": "no open decoder knows its transforms across components",  # JPEG 2000 Part 2
    "1.2.840.10008.1.2.4.93": "no open decoder knows its transforms across components",
    "1.2.840.10008.1.2.4.94": _JPIP,
    "1.2.840.10008.1.2.4.95": _JPIP,
    "1.2.840.10008.1.2.4.10": _VIDEO,  # .100 to .108: MPEG-2, MPEG-4, HEVC
    "1.2.840.10008.1.2.4.204": _JPIP,
    "1.2.840.10008.1.2.4.205": _JPIP,
    "1.2.840.10008.1.2.7": _VIDEO,  # SMPTE ST 2110
}
#: The distribution that brings each decoding module.
DISTRIBUTIONS: Final = {"gdcm": "python-gdcm", "jpeg_ls": "pyjpegls", "openjpeg": "pylibjpeg-openjpeg", "rle": "pylibjpeg-rle"}
#: pydicom's name for the plug-in around each decoding module.
PLUGINS: Final = {"gdcm": "gdcm", "jpeg_ls": "pyjpegls", "openjpeg": "pylibjpeg", "rle": "pylibjpeg"}


def decodable_transfer_syntaxes(versions: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the UIDs of the transfer syntaxes to negotiate: those whose decoder `versions` (`codec_versions`) names a version of.

    Without `versions` those whose decoder is installed, which is not yet to say that it can be loaded; imports none of them.
    """

    def is_there(module: str) -> bool:
        return not module or (find_spec(module) is not None if versions is None else bool(versions.get(module)))

    return tuple(uid for uid, module in CODECS.items() if uid not in NOT_OFFERED and is_there(module))


def unloadable(versions: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each decoder that cannot be loaded, with what follows from it and what to do."""
    return tuple(
        f"The decoder {module} cannot be loaded: images in {', '.join(uid for uid, by in CODECS.items() if by == module)} "
        f"are not taken from senders and not analyzed. Install {DISTRIBUTIONS[module]} again."
        for module in DISTRIBUTIONS
        if not versions.get(module)
    )


def why_not_decoded(uid: str) -> str:
    """Return why a transfer syntax is not decoded; '' if it is, or nothing is known of it."""
    if uid in CODECS:
        return ""
    return next((REFUSED[start] for start in sorted(REFUSED, key=len, reverse=True) if uid.startswith(start)), "")
