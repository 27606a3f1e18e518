"""Which label of a list does an answer name? Read without a judge, so that the same answer always reads the same.

The rule is ours (no official one exists), in full:

* Case makes no difference, nor whether words are parted by spaces, underscores or hyphens.
* A label counts where it stands as whole words: "pineapple" has no apple in it, and "crayfish" no ray.
* Plurals of a label and the names in `ALIASES` stand for it: other words for the same thing; a kind of it only where
  its name has another label in it, as a tiger shark's has.
* At each place the longest name wins: "pickup truck" is that and no truck, "sea turtle" is a turtle and no sea.
* Words that mean something else where they stand do not count (`DECOYS`): "it can be a bear" has no can in it, and
  "man-made" no man.
* An answer names a label if it has that one and no other; twice the same is one. With none or several it is unread.

What it cannot do: tell "an orange fox" (two of CIFAR-100's labels) from a fox, or find an aquarium fish in "a fish in a
tank". That is what judges are for; the two numbers stand side by side.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

MNIST = tuple("0123456789")
_NUMBERS = "zero one two three four five six seven eight nine"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fine_label_names of CIFAR-100's meta, in its order, as spelled there.
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""
CIFAR100 = tuple(_CIFAR100.split())
# The 100 classes of miniImageNet (Ravi and Larochelle, 2017) by synset, under the first of ImageNet's words for each;
# further words of ImageNet's follow it.
SYNSETS: Mapping[str, tuple[str, ...]] = {
    line.split(": ")[0]: tuple(line.split(": ")[1].split(", "))
    for line in """\
n01532829: house finch, linnet
n01558993: robin, American robin
n01704323: triceratops
n01749939: green mamba
n01770081: harvestman, daddy longlegs
n01843383: toucan
n01855672: goose
n01910747: jellyfish
n01930112: nematode, nematode worm, roundworm
n01981276: king crab, Alaska crab, Alaskan king crab, Alaska king crab
n02074367: dugong
n02089867: Walker hound, Walker foxhound
n02091244: Ibizan hound, Ibizan Podenco
n02091831: Saluki, gazelle hound
n02099601: golden retriever
n02101006: Gordon setter
n02105505: komondor
n02108089: boxer
n02108551: Tibetan mastiff
n02108915: French bulldog
n02110063: malamute, malemute, Alaskan malamute
n02110341: dalmatian, coach dog, carriage dog
n02111277: Newfoundland, Newfoundland dog
n02113712: miniature poodle
n02114548: white wolf, Arctic wolf
n02116738: African hunting dog, hyena dog, Cape hunting dog
n02120079: Arctic fox, white fox
n02129165: lion, king of beasts
n02138441: meerkat, mierkat
n02165456: ladybug, ladybeetle, lady beetle, ladybird, ladybird beetle
n02174001: rhinoceros beetle
n02219486: ant, emmet, pismire
n02443484: black-footed ferret, ferret
n02457408: three-toed sloth
n02606052: rock beauty
n02687172: aircraft carrier, flattop, attack aircraft carrier
n02747177: ashcan, trash can, garbage can, wastebin, ash bin, ashbin, dustbin, trash barrel, trash bin
n02795169: barrel, cask
n02823428: beer bottle
n02871525: bookshop, bookstore, bookstall
n02950826: cannon
n02966193: carousel, carrousel, merry-go-round, whirligig
n02971356: carton
n02981792: catamaran
n03017168: chime, bell, gong
n03047690: clog, geta, patten, sabot
n03062245: cocktail shaker
n03075370: combination lock
n03127925: crate
n03146219: cuirass
n03207743: dishrag, dishcloth
n03220513: dome
n03272010: electric guitar
n03337140: file, file cabinet, filing cabinet
n03347037: fire screen, fireguard
n03400231: frying pan, frypan, skillet
n03417042: garbage truck, dustcart
n03476684: hair slide
n03527444: holster
n03535780: horizontal bar, high bar
n03544143: hourglass
n03584254: iPod
n03676483: lipstick, lip rouge
n03770439: miniskirt
n03773504: missile
n03775546: mixing bowl
n03838899: oboe, hautboy, hautbois
n03854065: organ, pipe organ
n03888605: parallel bars
n03908618: pencil box, pencil case
n03924679: photocopier
n03980874: poncho
n03998194: prayer rug, prayer mat
n04067472: reel
n04146614: school bus
n04149813: scoreboard
n04243546: slot, slot machine, one-armed bandit
n04251144: snorkel
n04258138: solar dish, solar collector, solar furnace
n04275548: spider web, spider's web
n04296562: stage
n04389033: tank, army tank, armored combat vehicle, armoured combat vehicle
n04418357: theater curtain, theatre curtain
n04435653: tile roof
n04443257: tobacco shop, tobacconist shop, tobacconist
n04509417: unicycle, monocycle
n04515003: upright, upright piano
n04522168: vase
n04596742: wok
n04604644: worm fence, snake fence, snake-rail fence, Virginia fence
n04612504: yawl
n06794110: street sign
n07584110: consomme
n07613480: trifle
n07697537: hotdog, hot dog, red hot
n07747607: orange
n09246464: cliff, drop-off
n09256479: coral reef
n13054560: bolete
n13133613: ear, capitulum""".splitlines()
}
MINIIMAGENET = tuple(words[0] for words in SYNSETS.values())

# {label: what else it is called}.
ALIASES: Mapping[str, Sequence[str]] = {
    **dict(zip(MNIST, [(word,) for word in _NUMBERS.split()], strict=True)),
    **{words[0]: words[1:] for words in SYNSETS.values()},
    "airplane": ("aeroplane", "plane", "aircraft"), "automobile": ("car", "auto"), "truck": ("lorry",),
    "baby": ("infant",), "bicycle": ("bike", "mountain bike"), "cattle": ("cow",), "chimpanzee": ("chimp",),
    "couch": ("sofa",), "lawn_mower": ("lawnmower",), "maple_tree": ("maple",),
    "motorcycle": ("motorbike", "motor bike"), "oak_tree": ("oak",), "palm_tree": ("palm",),
    "pickup_truck": ("pickup", "pick up truck"), "pine_tree": ("pine",), "possum": ("opossum",), "rabbit": ("bunny",),
    "raccoon": ("racoon",), "ray": ("stingray",), "sea": ("ocean",), "seal": ("elephant seal", "leopard seal"),
    "shark": ("tiger shark",), "spider": ("wolf spider",), "streetcar": ("tram", "trolley", "street car"),
    "sweet_pepper": ("bell pepper", "pepper", "capsicum"), "telephone": ("phone",),
    "television": ("tv", "television set"), "turtle": ("sea turtle",), "wardrobe": ("closet",),
    "willow_tree": ("willow",), "worm": ("earthworm",),
}  # fmt: skip
# {label: phrases in which its word means something else}.
DECOYS: Mapping[str, Sequence[str]] = {
    "1": ("one of", "one number", "one digit", "one image", "one object", "only one", "the one", "this one"),
    "can": (
        "can't", "can also", "can be", "can clearly", "can have", "can help", "can i", "can identify", "can it",
        "can not", "can only", "can say", "can see", "can tell", "can vary", "can we", "can you",
    ),
    "lion": ("sea lion", "mountain lion"), "man": ("man made",), "ray": ("x ray",),
}  # fmt: skip

# Whose plural is not made by the rules of `_plural`.
_PLURALS = {"man": "men", "woman": "women", "mouse": "mice", "wolf": "wolves", "goose": "geese"}
_LETTER = r"[^\W_]"  # or digit


class Matcher:
    """Reads labels of one list.

    labels: as the dataset spells them. What they and their aliases are taken for is in `ALIASES` and `DECOYS`.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = tuple(labels)
        self._meant: dict[str, str | None] = {plain(label): label for label in self.labels}
        for label in self.labels:
            self._meant.update((plain(phrase), None) for phrase in DECOYS.get(label, ()))
        for label in self.labels:
            for name in (label, *ALIASES.get(label, ())):
                for form in (plain(name), _plural(plain(name))):
                    self._meant.setdefault(form, label)
        # Of the names that fit at a place the first is taken, so the longest stand first.
        names = sorted(self._meant, key=lambda name: (-len(name), name))
        either = "|".join(re.escape(name).replace(r"\ ", r"[\s_-]+") for name in names)
        self._pattern = re.compile(rf"(?<!{_LETTER})(?:{either})(?!{_LETTER})")

    def hits(self, text: str) -> list[str]:
        """The labels that a text names, each once, in the order in which they come first."""
        found = (self._meant[plain(match[0])] for match in self._pattern.finditer(_folded(text)))
        return list(dict.fromkeys(label for label in found if label is not None))


def only(hits: Sequence[str]) -> str | None:
    """The label that an answer names, of all labels in it; None: none or several."""
    return hits[0] if len(hits) == 1 else None


def plain(name: str) -> str:
    """A label or name whatever its case and separators."""
    return re.sub(r"[\s_-]+", " ", _folded(name)).strip()


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return text.replace("\u2019", "'").replace("\u2010", "-").replace("\u2011", "-")


def _plural(name: str) -> str:
    """Of the last word; what has none by these rules gets a harmless one."""
    *before, word = name.split(" ")
    if word in _PLURALS:
        word = _PLURALS[word]
    elif re.search(r"[^aeiou]y$", word):
        word = word[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh)$", word):
        word += "es"
    else:
        word += "s"
    return " ".join([*before, word])
