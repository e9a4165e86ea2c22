"""The long document that both workers are asked about: the station book of an invented tidal power company.

Written for this demo, the same at every call, as long as asked for. Pure; imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_FIRST_NAMES = ["Ada", "Tomas", "Greta", "Ivo", "Noor", "Pelle", "Ruth", "Silas", "Mina", "Edgar", "Lucia", "Hamish", "Yara"]
_LAST_NAMES = ["Lindqvist", "Okafor", "Hallam", "Marchetti", "Bakshi", "Strand", "Abara", "Whitcombe", "Kowalczyk", "Thorne"]
_LAST_NAMES += ["Ferro", "Boyd", "Haddad", "Penrose", "Sato", "Vasquez", "Moreau"]
_STATIONS = ["Gannet Point", "Mill Reach", "Skerry Bank", "Otter Narrows", "Long Quay", "Heron Sluice", "Widow's Ledge"]
_STATIONS += ["Amber Shoal", "Kelp Gate", "Tern Basin", "Old Causeway", "Salt Stairs", "Drift Weir", "Cinder Cove"]
_STATIONS += ["Seal Landing", "Marram Dyke", "Lantern Rock", "Plover Flats", "Iron Jetty", "Smuggler's Cut", "Broad Spit"]
_STATIONS += ["Curlew Bight", "Chalk Slip", "Monk's Ford", "Anchor Green", "Puffin Stack", "Rope Walk", "Copper Lock"]
_STATIONS += ["Eider Pool", "Black Groyne", "Shepherd's Hythe", "Glass Inlet", "Fulmar Head", "Barley Staithe", "Thorn Eyot"]
_STATIONS += ["Bell Sands", "Whale Bone", "Dunlin Creek", "Tollhouse Ferry", "Raven Scar", "Pilot's Rest", "Hollow Mole"]
_STATIONS += ["Saint Brannock", "Petrel Race", "Mussel Bed", "Quarry Hard", "Beacon Fen", "Winter Haven"]
_BUILDINGS = ["a brick tower", "a low granite house", "a steel platform", "a converted barn", "a round stone hut"]
_PLACES = [
    "on the north shore",
    "where the channel bends",
    "below the chapel",
    "at the end of the pier road",
    "on the island side",
]
_COLOURS = ["green", "yellow", "white", "orange", "blue", "red"]
_SEASONS = ["in spring", "after the autumn storms", "in the first week of July", "when the herring leave", "before the frost"]
_FAULTS = ["weed in the intake screens", "a worn thrust bearing", "salt on the busbars", "a slow gate valve", "drifting timber"]
_CURES = [
    "stop the turbine, close the upstream gate, and clear the screens by hand from the gangway",
    "reduce the load to half, listen at the bearing cap, and call the workshop if the sound does not change",
    "open the breaker, rinse the bars with fresh water, and let them dry for two tides before closing it again",
    "work the valve twice through its full travel and write the time of both strokes into the log",
    "warn the harbour pilot, light the boom, and haul the timber out at slack water",
]
_HABITS = [
    "Visitors sign the book in the porch and leave wet boots there.",
    "The kettle belongs to the night watch and is not lent out.",
    "The boat is turned keel up every evening, whatever the forecast says.",
    "A spare key hangs behind the barometer, and the barometer is not to be tapped.",
    "The dog is called Bosun and is the only member of staff who may sleep on duty.",
    "Letters for the mainland go into the tin box before the morning ebb.",
    "Nobody walks the outer wall alone after dark.",
]


class Station(NamedTuple):
    """The facts of one chapter. Every number of the company's stations is derived from its place in the book."""

    name: str
    keeper: str
    channel: int
    """Radio channel."""
    megawatts: int
    lamp: str


class Document(NamedTuple):
    text: str
    chapters: int


class Question(NamedTuple):
    text: str
    fact: str
    """What a right answer contains. It stands in the notices: the book's last pages, the forms, follow them, so that the
    fact always lies in whole chunks that a reader can share, never in the tail that it computes itself."""


FIRST_QUESTION = Question("Where do the best apples come from?", "Saint Elwyn")
SECOND_QUESTION = Question("What is the password for the coal shed?", "periwinkle")

MIN_TOKENS = 700
MAX_TOKENS = 7800
"""The model has 8,192 positions; question and answer need some."""


def build(tokens: int, count: Callable[[str], int]) -> Document:
    """The book with as many chapters as fit into `tokens` tokens, as `count` counts them. Pure."""
    parts = [_PREFACE]
    used = sum(map(count, (_PREFACE, _NOTICES, _FORMS)))
    while (used := used + count(chapter := _chapter(len(parts)))) <= tokens:
        parts.append(chapter)
    return Document("\n\n".join([*parts, _NOTICES, _FORMS]), len(parts) - 1)


def station(number: int) -> Station:
    """Facts of chapter `number`, from 1. Station names come round again, numbered, after 48 chapters; keepers after 221."""
    round_, place = divmod(number - 1, len(_STATIONS))
    name = _STATIONS[place] if round_ == 0 else f"{_STATIONS[place]} {round_ + 1}"
    keeper = f"{_FIRST_NAMES[number * 5 % len(_FIRST_NAMES)]} {_LAST_NAMES[number * 7 % len(_LAST_NAMES)]}"
    return Station(name, keeper, 11 + (number * 7) % 83, 12 + (number * 11) % 37, _COLOURS[(number * 5 + 1) % len(_COLOURS)])


def _chapter(number: int) -> str:
    here, left, right = station(number), station(max(1, number - 1)), station(number + 1)
    pick = number - 1
    fault = pick % len(_FAULTS)
    tide = 4 + (number * 3) % 9
    return (
        f"Chapter {number}. {here.name}\n"
        f"The station at {here.name} is {_BUILDINGS[pick * 2 % 5]} {_PLACES[pick * 3 % 5]}. "
        f"The keeper of {here.name} is {here.keeper}, who answers on radio channel {here.channel}. "
        f"The turbines of {here.name} give {here.megawatts} megawatts at a spring tide with a head of {tide} metres. "
        f"The lamp on the roof is {here.lamp}; when it is dark, the station is out of service and ships keep clear. "
        f"The commonest fault {_SEASONS[pick * 3 % 5]} is {_FAULTS[fault]}: {_CURES[fault]}. "
        f"If the keeper does not answer, call {left.name} first and then {right.name}. "
        f"{_HABITS[pick * 4 % 7]}"
    )


_PREFACE = """The Station Book of the Harrow Sound Tidal Company

This book is kept in every station house. It says who keeps each station, on which radio channel the keeper answers, \
what the turbines give, and what to do when something is wrong. Read the chapter of your own station on the first day \
of the month and the chapters of your neighbours whenever you are sent to help. Write nothing into the margins. \
Corrections go to the office in Harrow, which sends new pages twice a year."""

_NOTICES = """Notices for this year
The new ferry is called the Silver Teal and sails every Thursday at half past six. The company's cook, Martha Dunmore, \
retires in October and will be followed by her nephew. The best apples for the winter store come from the orchard at \
Saint Elwyn. The annual rowing race was won by the crew of Tern Basin in a time of nineteen minutes. The password for \
the coal shed is "periwinkle".\
"""

_FORMS = """Corrections and forms
Corrections to this book are sent to the office in Harrow on the yellow form. Write one correction on each form, in \
ink, with the number of the chapter, the old words and the new words, and the date on which you saw that the old words \
were wrong. Two people sign the form: the keeper who found the mistake, and the neighbour who has checked it. Forms \
without a second signature come back. The office answers within three weeks; until then the old words stand, unless \
somebody could come to harm by them, in which case you strike them out with a single line, so that they can still be \
read, and telephone.

Logs are kept for ten years. A log is opened with the station's name, the year and the name of the keeper, and it is \
closed with the same three things. Pages are numbered by hand before the first entry is made, and no page is ever torn \
out; a spoilt page is crossed from corner to corner and signed. Times are those of the station clock, which is set \
every Monday by the signal from the mainland. The height of the tide is read at the outer gauge, to the nearest hand, \
at every high and low water, by day and by night, in every weather in which the gangway can be walked."""
