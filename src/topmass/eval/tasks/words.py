"""Word lists of the tasks, and running prose; every list is disjoint from the others, so that no question is answered by chance."""

import random

__all__ = ["ADJECTIVES", "FIELDS", "INSTRUMENTS", "KINDS", "NAMES", "NOISE", "NOUNS", "PLACES", "Prose"]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _split(
    """amber ancient arched ashen azure banded barren blunt bold brave brazen brisk broad bronze carved cedar chilly
    civil clever coiled coral crimson crisp curved damp dapper dented dim dusty eager ebony fabled faint fancy flat
    floral frail frosty gentle gilded glossy grand granite hazy hollow humble indigo inner ivory jolly keen lavish
    lean linen lively lofty lone loyal marble mellow merry misty modest mossy neat nimble noble oaken opal outer
    oval pallid patched plain polar prime proud quaint rapid rigid ripe rosy rugged rustic salty scarlet serene
    shady sleek slender solid spare steep striped sturdy subtle sunny tidy timid twin upper vivid woven"""
)
NOUNS = _split(
    """anchor anvil apron arbor arrow badge bakery barge barrel basin basket beacon bell bench bobbin bonnet bottle
    bowl bracket broom bucket buckle cabin cable candle canoe canopy canvas cart cellar chain chapel chart chest
    chimney cloak clock coffer collar comb compass cottage cradle crane crate crown cushion dagger desk dock drawer
    easel engine ferry fiddle flag flask folder fountain frame funnel furnace gable garland gate girdle glove goblet
    grill hammock handle harness hatch hedge helmet hinge hook hutch inkwell jacket jar jetty jug keel kettle kiosk
    knob label ladder lantern lattice ledge ledger lens lever locker locket loom magnet mantle map mast medal mill
    mirror mitten mortar mug needle nozzle oar orchard oven paddle pail palette panel parcel pavilion pedal pendant
    pillar pillow pipe pitcher plank plough pocket podium pouch pulley pump quill quilt rack raft rail ramp reel
    ribbon rudder rug saddle sail sandal sash satchel scarf sceptre screen scroll shelf shield shovel shutter sickle
    sieve sign skillet sled sleeve socket spade spindle spool stable stair statue stool strap stove table tablet
    tank thimble throne ticket tile torch towel tower tray trellis trowel trunk tunnel turbine turret urn valve vase
    vault veil vessel vest wagon wallet weir wharf whistle wick willow winch window wreath yoke"""
)
NAMES = _split(
    """Abel Ada Agnes Alma Amos Anton Astrid Basil Bela Berta Boris Bruno Carla Celia Clara Conrad Cora Cyril Dalia
    Dario Doris Edgar Edith Elias Elsa Emil Enid Ezra Felix Flora Fritz Gerda Gilda Greta Gustav Hanna Hector Helga
    Hugo Ida Igor Ingrid Iris Ivan Jonas Judith Julius Karin Kaspar Klara Lars Lena Leon Linus Ludo Mabel Magda
    Marek Marta Milan Mona Nadia Nestor Nora Olga Olaf Oscar Otto Petra Ralf Rosa Rufus Selma Silas Sonia Sven Tamar
    Thea Tilda Tobias Ursula Vera Viktor Walter Wanda Wilma Xenia Yara Yusuf Zelda"""
)
PLACES = _split("Bazaar Harbour Station Terrace Academy Castle Forest Island Valley Arcade Library Museum")
KINDS = {
    "bird": _split("heron raven finch swan falcon stork plover thrush"),
    "metal": _split("iron copper silver nickel zinc cobalt tin lead"),
    "fruit": _split("apple pear cherry mango quince grape lemon fig"),
    "tree": _split("birch maple elm poplar spruce alder larch yew"),
    "spice": _split("pepper ginger saffron clove nutmeg cumin vanilla anise"),
    "fish": _split("trout salmon perch herring carp tuna eel cod"),
    "flower": _split("tulip daisy poppy violet lily aster peony orchid"),
    "stone": _split("agate basalt flint jasper onyx slate topaz quartz"),
    "dance": _split("waltz tango polka samba minuet jig bolero rumba"),
    "game": _split("chess darts croquet dominoes poker bingo tennis golf"),
    "cloth": _split("silk velvet denim cotton wool satin tweed felt"),
    "drink": _split("cocoa cider coffee punch juice mead broth soda"),
}
INSTRUMENTS = {  # the thing that a needle names -> the field that a question names
    "music": ("violin", "trumpet", "cello"),
    "astronomy": ("telescope", "sextant", "planetarium"),
    "surgery": ("scalpel", "stethoscope", "bandage"),
    "painting": ("brush", "turpentine", "watercolour"),
    "baking": ("dough", "yeast", "flour"),
    "farming": ("tractor", "seeds", "hay"),
    "fishing": ("rod", "bait", "trawl"),
    "tailoring": ("scissors", "thread", "buttons"),
    "geology": ("hammer", "fossil", "ore"),
    "chemistry": ("beaker", "acid", "burner"),
    "law": ("statute", "gavel", "verdict"),
    "sailing": ("spinnaker", "tiller", "halyard"),
    "photography": ("tripod", "camera", "negative"),
    "masonry": ("bricks", "cement", "chisel"),
    "beekeeping": ("hive", "honey", "smoker"),
    "mathematics": ("theorem", "abacus", "equation"),
    "journalism": ("headline", "reporter", "column"),
    "printing": ("typeface", "press", "ink"),
    "mining": ("pickaxe", "shaft", "coal"),
    "theatre": ("script", "costume", "curtain"),
    "cycling": ("bicycle", "spokes", "saddlebag"),
    "climbing": ("carabiner", "crampons", "summit"),
    "winemaking": ("vineyard", "cork", "cask"),
    "meteorology": ("barometer", "thermometer", "forecast"),
    "teaching": ("blackboard", "chalk", "pupils"),
    "weaving": ("shuttle", "yarn", "tapestry"),
    "banking": ("loan", "coins", "mortgage"),
    "aviation": ("propeller", "cockpit", "parachute"),
    "pottery": ("clay", "kiln", "glaze"),
    "archery": ("longbow", "quiver", "target"),
    "plumbing": ("faucet", "drain", "wrench"),
    "dentistry": ("molar", "toothbrush", "filling"),
}
FIELDS = tuple(INSTRUMENTS)

NOISE = (
    "Rain fell on the roof all night and nobody minded.",
    "The road goes up and then the road goes down again.",
    "Somewhere a door was shut and then it was quiet.",
    "One day follows another and so does the weather.",
    "There is more to come and there always was.",
)
_HAND_WRITTEN = (
    "Nobody could remember who had planted the first row of beans.",
    "By the time the soup was ready the guests had talked themselves hungry.",
    "A letter came on Tuesday and was left unopened until the end of the week.",
    "The tide took the sand away and brought most of it back.",
    "It was said that the bridge had been built twice because the river moved.",
    "In winter the children went to school across the ice.",
    "He counted the steps on the way up and forgot the number on the way down.",
    "She wrote the date at the top of the page and then wrote nothing else.",
    "The train was late again and the platform filled with patient people.",
    "What the wind had scattered they gathered before dark.",
    "Their uncle kept every receipt and could find none of them.",
    "Old maps show a lake where the football field is now.",
    "The dog slept through the storm and woke up at the sound of a spoon.",
    "Somebody had painted the gatepost green and nobody owned up to it.",
    "When the power failed they told the long story about the goat.",
    "The baker opened at five and had nothing left to sell by nine.",
    "After the flood every house in the lower street smelled of river.",
    "It takes two people to fold a sheet and three to argue about it.",
    "The new clerk read the rules aloud until everyone knew them.",
    "A narrow path led past the well to a field that was never mown.",
    "They agreed to meet at noon and each of them came an hour early.",
    "The roof leaked in the same place as last year.",
    "On market days the square was so full that carts had to wait outside.",
    "The nurse spoke softly and the room became calm.",
    "Of the four roads out of town only one was paved.",
    "Snow covered the tracks before anyone thought of following them.",
    "The teacher drew a circle and asked the class to find the middle.",
    "There was a smell of bread in the hall and no bread to be seen.",
    "Every spring the same pair of geese came back to the pond.",
    "He said that he would fix the chair and he said it every Sunday.",
)
_WHO = """the old miller|the clerk|a tall stranger|the captain|the widow|her brother|his neighbour|the young doctor|the gardener|a farmer
the mayor|the postman|the night guard|the cook|a quiet child|the owner|the visitor|their cousin|the driver|the judge|a sailor|the porter
the shepherd|the student|an officer|the landlord|my aunt|the singer|a merchant|the engineer""".replace("\n", "|").split(
    "|"
)
_DID = """carried|found|sold|watched|repaired|borrowed|counted|forgot|cleaned|lost|followed|admired|bought|moved|hid|described|lifted|ignored
guarded|painted|ordered|opened|returned|mentioned""".replace("\n", "|").split("|")
_WHAT = """the letters|a box of nails|the broken chair|the morning paper|two loaves of bread|the wet coats|an empty room|the red door
a long rope|the accounts|a heavy stone|the last boat|the piano|some old photographs|the horses|a bag of corn|the lamp|the small garden
his best shoes|a cup of tea|the wooden fence|the keys|three blankets|the dinner plates|a strange noise|the blue tent""".replace(
    "\n", "|"
).split("|")
_WHERE = """near the river|behind the church|in the square|at the corner|under the bridge|by the sea|on the hill|in the kitchen|across the street
along the wall|outside the town|in the attic|beside the road|at the inn|below the cliff|in the north field""".replace(
    "\n", "|"
).split("|")
_WHEN = """in the morning|before noon|after supper|every week|last summer|at dusk|during the war|that evening|once a year|in late autumn
on Friday|for a while|all day long|at first light""".replace("\n", "|").split("|")
_WENT = ["waited", "walked", "slept", "sang", "worked", "rested", "argued", "laughed", "stood", "sat"]
_LINK = ("and", "but", "while", "because", "so")
_OPEN = (
    "Then",
    "Meanwhile",
    "Later",
    "Of course",
    "As usual",
    "To be sure",
    "Even so",
    "Sometimes",
    "Nobody knew that",
    "It seems that",
)


class Prose:
    """Endless made-up prose: sentences from a small grammar, with hand-written ones among them.

    Example:
        >>> Prose()(random.Random(0)).endswith(".")
        True
    """

    def __call__(self, rng: random.Random) -> str:
        """The next sentence."""
        if rng.random() < 0.12:
            return rng.choice(_HAND_WRITTEN)
        text = _clause(rng)
        if rng.random() < 0.3:
            text = f"{text} {rng.choice(_LINK)} {_clause(rng)}"
        if rng.random() < 0.25:
            return f"{rng.choice(_OPEN)} {text}."
        return f"{text[0].upper()}{text[1:]}."


def _clause(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return f"{rng.choice(_WHO)} {rng.choice(_WENT)} {rng.choice(_WHERE)}"
    text = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)}"
    u = rng.random()
    if u < 0.35:
        return f"{text} {rng.choice(_WHERE)}"
    return f"{text} {rng.choice(_WHEN)}" if u < 0.7 else text
