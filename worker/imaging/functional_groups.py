"""Functional groups of an enhanced object → the facts of each of its frames. Runs in a decoding process, and nowhere else.

::

    elements of the file ─┬─ shared groups ─┬─ groups of frame f ─▶ one flat set of elements, as a classic slice has ─▶ facts_of
                          │                 │  (a later one stands before an earlier)
                          └─ without geometry and rescale, which an enhanced object says in its groups alone

So an enhanced object says what the classic series of the same data says, by the same function. The answer is compact: what all
frames share is said once. Not read: Real World Value Mapping, private groups.

References: PS3.3 §C.7.6.16 (Multi-frame Functional Groups), §C.8.13 (MR), §C.8.15 (CT), §C.8.22 (PET), PS3.3 §A.70 (legacy converted).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from worker.errors import PixelError
from worker.imaging.facts import TAGS, Elements, facts_of, values_of


def _tags(*keywords: str) -> frozenset[int]:
    return frozenset(tag_for_keyword(keyword) or 0 for keyword in keywords)


#: The groups that are read, and of these the sequences that hold another one.
_GROUPS: Final = _tags(
    "PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence",
    "FrameVOILUTSequence", "FrameContentSequence", "FrameAnatomySequence", "CTImageFrameTypeSequence", "MRImageFrameTypeSequence",
    "PETFrameTypeSequence", "XRay3DFrameTypeSequence", "MREchoSequence", "MRDiffusionSequence", "DiffusionGradientDirectionSequence",
    "CTReconstructionSequence", "CTXRayDetailsSequence",
    "CardiacSynchronizationSequence", "ContrastBolusUsageSequence",
)  # fmt: skip
#: What a converter had no group for (PS3.3 §C.7.6.16.2.25): never geometry or rescale, which have theirs.
_LEFT_OVER: Final = _tags("UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence")
#: What an enhanced object calls otherwise than a classic one.
_CLASSIC_NAMES: Final = {
    tag_for_keyword(enhanced): TAGS[classic]
    for enhanced, classic in (
        ("EffectiveEchoTime", "EchoTime"),
        ("FrameType", "ImageType"),
        ("FrameAcquisitionNumber", "AcquisitionNumber"),
        ("FrameAcquisitionDateTime", "AcquisitionDateTime"),
        ("FrameLaterality", "ImageLaterality"),
        ("TemporalPositionIndex", "TemporalPositionIdentifier"),
        ("NominalCardiacTriggerDelayTime", "TriggerTime"),
        ("ContrastBolusAgentAdministered", "ContrastBolusAgent"),
    )
}
#: What a group may say, and a header without groups alone: geometry and rescale outside the groups mean nothing in an enhanced object.
_IN_GROUPS_ONLY: Final = _tags(
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceLocation", "RescaleSlope", "RescaleIntercept", "RescaleType"
)
_MAY_SAY: Final = (
    _IN_GROUPS_ONLY
    | frozenset(_CLASSIC_NAMES.values())
    | _tags("DiffusionBValue", "DiffusionGradientOrientation", "StackID")
    | _tags("NominalPercentageOfCardiacPhase", "EchoNumbers", "KVP", "ConvolutionKernel", "AcquisitionDate", "AcquisitionTime")
)
#: Deepest nesting of groups: diffusion, and its direction.
_DEPTH: Final = 2


def facts_of_frames(elements: Elements, transfer_syntax_uid: str, *, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the facts that all frames share, and of each frame its number and those in which it differs.

    Parameters
    ----------
    count
        How many frames the pixel data hold.

    Raises
    ------
    PixelError
        The functional groups are of another number of frames, or hold no items.
    """
    shared = values_of(elements, "SharedFunctionalGroupsSequence")
    each = values_of(elements, "PerFrameFunctionalGroupsSequence")
    if not shared and not each:
        return facts_of(elements, transfer_syntax_uid), [{"number": number} for number in range(1, count + 1)]
    if len(shared) > 1 or (each and len(each) != count):
        raise PixelError(f"The functional groups are of {len(each)} frames and {len(shared)} shared items; there are {count} frames.")
    base = {tag: element for tag, element in elements.items() if tag not in _IN_GROUPS_ONLY}
    for item in shared:
        base |= _said(item)
    facts = [facts_of(base | _said(item), transfer_syntax_uid) for item in each] or [facts_of(base, transfer_syntax_uid)] * count
    common = {name: value for name, value in facts[0].items() if all(one[name] == value for one in facts)}
    differ = facts[0].keys() - common.keys()
    return common, [{"number": number, **{name: one[name] for name in differ}} for number, one in enumerate(facts, start=1)]


def _said(groups: Dataset) -> Elements:
    """Flatten the groups of one item, under the names of a classic header; what is left over says less than a group does."""
    said: Elements = {}
    may_say = _MAY_SAY | _CLASSIC_NAMES.keys()
    for sequences, tags in ((_LEFT_OVER, may_say - _IN_GROUPS_ONLY), (_GROUPS, may_say)):
        for item in _items(groups, sequences, _DEPTH):
            for tag in item.keys() & tags:
                element = item[tag]
                # An agent that was not administered is no contrast.
                if element.keyword != "ContrastBolusAgentAdministered" or element.value == "YES":
                    said[_CLASSIC_NAMES.get(tag, tag)] = element
    return said


def _items(groups: Dataset, sequences: frozenset[int], depth: int) -> Iterator[Dataset]:
    for tag in sorted(groups.keys() & sequences):
        group = groups[tag].value
        if isinstance(group, Sequence) and len(group) == 1:
            yield group[0]
            if depth > 1:
                yield from _items(group[0], _GROUPS, depth - 1)
