"""The noun phrases of captions, by spaCy or by a small set of rules.

    spacy     the noun chunks of a spaCy pipeline with a parser (en_core_web_sm), as LLaVA did for CC3M
    builtin   rules and word lists for the English of captions: no model, some sixty times faster, less exact

Either way a phrase is lower-case, without the articles, possessives, quantifiers and numbers in front ("a
small dog", "the small dog" and "two small dog" are one concept); a pronoun alone is none. Plurals stay.

Other libraries were looked at: the chunkers of NLTK, TextBlob and pattern need corpora that their packages
do not bring, simplemma and lemminflect give lemmas and no phrases.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vflax.errors import UserError

KINDS = ("auto", "spacy", "builtin")
DEFAULT_SPACY_MODEL = "en_core_web_sm"
# Raise it when the rules or lists below find other phrases.
_BUILTIN_VERSION = "1"
_SPACY_REMEDY = (
    f"pip install 'vflax[balance]', then fetch a pipeline (python -m spacy download {DEFAULT_SPACY_MODEL}), "
    "or take --phrases=builtin"
)


class Extractor(Protocol):
    """Finds noun phrases."""

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        """The phrases of each caption in their order, each once."""
        ...


@dataclass(frozen=True)
class Choice:
    """Which extractor, resolved: small, and `load` makes it in any process.

    name: "spacy" or "builtin"; version: of the rules or of spaCy; model: "NAME VERSION" of spaCy's pipeline, "".
    """

    name: str
    version: str
    model: str = ""
    spacy_model: str = ""

    def load(self) -> Extractor:
        """Make the extractor."""
        return _Spacy(self.spacy_model) if self.name == "spacy" else builtin


def choose(phrases: str, spacy_model: str | None = None) -> Choice:
    """The extractor for --phrases and --spacy_model.

    Args:
        phrases: "spacy", "builtin", or "auto": spaCy where it and the pipeline are installed.
        spacy_model: a pipeline's name or folder; None: en_core_web_sm. One that is named must be there.

    Raises:
        UserError: no such extractor, spaCy or its pipeline is missing, or the pipeline has no parser.
    """
    if phrases not in KINDS:
        raise UserError(f"--phrases={phrases}: expected one of {', '.join(KINDS)}")
    if phrases == "builtin":
        if spacy_model is not None:
            raise UserError(
                f"--spacy_model={spacy_model} has no meaning with --phrases=builtin; drop one of them"
            )
        return Choice("builtin", _BUILTIN_VERSION)
    if phrases == "auto" and spacy_model is None and not _spacy_is_there():
        return Choice("builtin", _BUILTIN_VERSION)
    nlp = _load_spacy(spacy_model or DEFAULT_SPACY_MODEL)
    meta = nlp.meta
    return Choice(
        "spacy",
        importlib.metadata.version("spacy"),
        f"{meta.get('lang', '')}_{meta.get('name', '')} {meta.get('version', '')}",
        spacy_model or DEFAULT_SPACY_MODEL,
    )


# ---------------------------------------------------------------------------------------------------------
# spaCy


def _spacy_is_there() -> bool:
    """Whether spaCy and its usual pipeline are installed, without the seconds that importing it takes."""
    if importlib.util.find_spec("spacy") is None:
        return False
    try:
        importlib.metadata.distribution(DEFAULT_SPACY_MODEL)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load_spacy(model: str) -> Any:
    try:
        import spacy
    except ImportError:
        raise UserError(f"--phrases=spacy: spaCy is not installed. {_SPACY_REMEDY}") from None
    try:
        nlp = spacy.load(model, exclude=["ner", "lemmatizer"])
    # OSError: not there; ValueError, ImportError, KeyError: of another version or with parts that are not installed.
    except (OSError, ValueError, ImportError, KeyError) as error:
        what = "is no folder of one" if Path(model).exists() else "is not installed"
        raise UserError(
            f"--spacy_model={model}: this spaCy pipeline {what} or cannot be loaded "
            f"({str(error).splitlines()[0][:200]}). {_SPACY_REMEDY}"
        ) from None
    try:
        list(nlp("A dog on a mat.").noun_chunks)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"--spacy_model={model}: the pipeline gives no noun chunks: it has the parts "
            f"{', '.join(nlp.pipe_names) or 'none'}, and they need a parser ({str(error)[:120]}). "
            f"Take {DEFAULT_SPACY_MODEL} or another with one"
        ) from None
    return nlp


class _Spacy:
    def __init__(self, model: str) -> None:
        self._nlp = _load_spacy(model)

    def __call__(self, captions: Sequence[str]) -> list[list[str]]:
        return [self._phrases(doc) for doc in self._nlp.pipe(captions, batch_size=256)]

    @staticmethod
    def _phrases(doc: Any) -> list[str]:
        chunks = (words(chunk.text) for chunk in doc.noun_chunks)
        return _unique(strip_front([word for word in chunk if word != _PAUSE]) for chunk in chunks)


# ---------------------------------------------------------------------------------------------------------
# Words

# A word with its inner apostrophes, hyphens and dots ("man's", "t-shirt", "u.s"); or what separates.
_TOKEN = re.compile(r"[^\W_]+(?:['\-&.][^\W_]+)*|[^\w\s']")
_PAUSE = "."


def words(caption: str) -> list[str]:
    """Lower-case words; "." for each sign that separates."""
    tokens = _TOKEN.findall(caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return [token if token[0].isalnum() else _PAUSE for token in tokens]


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ARTICLES = _set("a an the this that these those")
_POSSESSIVES = _set("my your his her its our their whose")
_QUANTIFIERS = _set(
    "some any no every each either neither both all several many few much more most other another various "
    "such enough half one two three four five six seven eight nine ten eleven twelve dozen dozens hundred "
    "hundreds thousand thousands what which"
)
_FRONT = _ARTICLES | _POSSESSIVES | _QUANTIFIERS
_PRONOUNS = _set(
    "i you he she it we they me him us them who whom myself yourself himself herself itself ourselves "
    "themselves something someone somebody anything anyone anybody nothing everything everyone everybody "
    "mine yours hers ours theirs here there"
)
_PREPOSITIONS = _set(
    "of in on at by for with from to into onto over under above below behind beside besides between among "
    "amongst around about across against along alongside through throughout toward towards near next inside "
    "outside within without off up down out upon during before after until till since past beyond beneath "
    "underneath atop amid despite except like unlike as than per via away together apart aside ahead back "
    "forward forwards backwards onward upside"
)
_CONJUNCTIONS = _set(
    "and or but nor so yet because while when where whereas if though although whether how why"
)
_AUXILIARIES = _set(
    "is are was were be been being am do does did done doing has have had having can could will would shall "
    "should may might must isn't aren't wasn't weren't don't doesn't didn't hasn't haven't can't won't it's "
    "that's there's he's she's they're we're i'm you're"
)
_ADVERBS = _set(
    "not very too also just only even still already again once twice then now never ever always often "
    "sometimes almost quite rather really well perhaps maybe else instead however therefore soon later today "
    "yesterday tomorrow tonight ago far almost fast"
)
_BREAKS = _PRONOUNS | _PREPOSITIONS | _CONJUNCTIONS | _AUXILIARIES | _ADVERBS

# Common adjectives: a phrase does not end with one ("the sky is blue").
_ADJECTIVES = _set(
    "red green blue yellow black white brown gray grey orange purple pink golden silver blonde blond dark "
    "light bright pale colorful colourful multicolored striped plaid big small large little tiny huge giant "
    "tall short long wide narrow thick thin high low deep shallow old young new modern ancient vintage "
    "antique fresh clean dirty wet dry hot cold warm cool frozen empty full open closed broken beautiful "
    "pretty cute lovely nice good great bad best better happy sad smiling funny fancy elegant stylish simple "
    "plain traditional national local public private wooden metallic snowy sunny cloudy rainy foggy grassy "
    "sandy rocky dusty muddy leafy busy crowded quiet calm lonely alone asleep awake different same similar "
    "single double various own main central first second third last early late ready able sure famous popular "
    "rich poor strong weak heavy soft hard smooth rough sharp flat round square curved straight male female "
    "human wild domestic american british english french german italian chinese japanese indian asian "
    "african european mexican professional political economic social digital natural abstract seamless "
    "delicious tasty ripe raw sweet sour spicy healthy fluffy furry hairy shiny fake real royal urban rural "
    "outdoor indoor front rear left right upper lower nearby distant adorable unique creative interesting"
)

# Verbs that captions use: base forms; those that are nouns as often are told by what stands before them.
_VERBS = _set(
    "sit stand walk run ride hold wear look watch play eat drink lie lay sleep fly jump swim surf skate "
    "drive carry pull push throw catch hit kick swing lean hang cover fill show display feature contain "
    "include make take get give go come put use cut cook prepare serve read write talk speak smile laugh "
    "pose wait work move turn travel cross pass enter leave arrive attend perform compete celebrate enjoy "
    "try begin start stay keep hug kiss touch feed graze relax stare gaze "
    "reach climb fall rise grow shine blow flow float sail hover glide chase follow lead meet "
    "join gather fit decorate paint draw build grab pet wash close sell buy "
    "wave cast dress sing dance stretch approach appear seem become remain belong depict portray "
    "illustrate see hear feel think know want need love let say tell ask call speak bring send win "
    "lose score fight shoot tend vie tackle slide lick sniff chew bite dig crouch kneel bend "
    "wander roam run overlook surround separate connect dine sip skateboard"
)
_IRREGULAR = _set(
    "sat stood ran rode held wore ate drank lay laid slept flew swam drove threw caught swung hung made took "
    "got gave went came put used cut wrote read spoke left began kept met led fell rose grew shone blew lost "
    "won fought shot dug bent knelt built bought sold sang saw seen heard felt thought knew said told brought "
    "sent taken given gone worn held made shown flown thrown eaten driven ridden written known drawn grown "
    "born found set seated"
)
# "-ing" and "-ed" that are no forms of a verb, or that stand for things in captions as a rule.
_ING_NOUNS = _set(
    "building buildings ceiling painting paintings wedding evening morning clothing king ring wing wings rings "
    "kings string strings spring thing things railing railings lighting setting meeting pudding icing frosting "
    "stuffing topping toppings awning swing swings drawing drawings parking crossing landing ceilings "
    "skateboarding snowboarding surfing skiing boxing dressing earring earrings sling sibling duckling "
    "ducklings wedding weddings writing siding flooring awnings buildings feeling beijing filling wiring "
    "engraving carving carvings stocking stockings offering training racing shopping fishing seating vending"
)
_ED_NOUNS = _set(
    "bed beds shed sheds seed seeds weed weeds reed reeds feed sled sleds shred breed breeds speed red"
)
_LY_NOUNS = _set(
    "family fly butterfly belly jelly lily dragonfly ally assembly italy july supply reply rally bully doily"
)
_LY_ADJECTIVES = _set(
    "lovely lonely friendly elderly early daily only holy ugly curly fly wooly woolly silly bubbly family"
)


def _verb_forms() -> frozenset[str]:
    """Base form and third person; past and -ing forms are told by their endings."""
    forms = set(_VERBS) | _IRREGULAR
    for verb in _VERBS:
        if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
            forms.add(verb + "es")
        elif verb.endswith("y") and verb[-2] not in "aeiou":
            forms.add(verb[:-1] + "ies")
        else:
            forms.add(verb + "s")
    return frozenset(forms)


_VERB_FORMS = _verb_forms()


def strip_front(phrase: Sequence[str]) -> str:
    """The concept of a phrase: without articles, possessives, quantifiers and numbers in front; "" for a pronoun."""
    start = 0
    while start < len(phrase) and (phrase[start] in _FRONT or phrase[start].isdigit()):
        start += 1
    kept = phrase[start:]
    return "" if len(kept) == 1 and kept[0] in _PRONOUNS else " ".join(kept)


def _unique(phrases: Iterator[str] | Any) -> list[str]:
    return list(dict.fromkeys(phrase for phrase in phrases if phrase))


# ---------------------------------------------------------------------------------------------------------
# The built-in rules


def builtin(captions: Sequence[str]) -> list[list[str]]:
    """Noun phrases by rules.

    A phrase is a run of words that nothing breaks: not a sign, a word of a closed class (preposition, pronoun,
    conjunction, auxiliary, adverb), or a verb. What may be a verb or not is told by the word before it: "a walk",
    "a baked potato", but "a man walks", "a potato baked". Adjectives at the end go.
    """
    return [_unique(" ".join(run) for run in _runs(words(caption))) for caption in captions]


def _runs(tokens: list[str]) -> Iterator[list[str]]:
    run: list[str] = []
    opened = False  # an article or the like stands right before the run
    for i, token in enumerate(tokens):
        following = tokens[i + 1] if i + 1 < len(tokens) else _PAUSE
        if token in _FRONT or token.isdigit():
            yield from _finish(run)
            run, opened = [], True
        elif _breaks(token, run, opened, following):
            yield from _finish(run)
            run, opened = [], False
        else:
            run.append(token)
    yield from _finish(run)


def _finish(run: list[str]) -> Iterator[list[str]]:
    while run and (_is_modifier(run[-1]) or run[-1] in _IRREGULAR or run[-1].endswith("'s")):
        run = run[:-1]
    if run and any(len(word) > 1 for word in run):
        yield run


def _is_participle(word: str) -> bool:
    return (word.endswith("ed") and len(word) > 4 and word not in _ED_NOUNS) or (
        word.endswith("ing") and len(word) > 4 and word not in _ING_NOUNS
    )


def _is_modifier(word: str) -> bool:
    return word in _ADJECTIVES or _is_participle(word)


def _breaks(token: str, run: list[str], opened: bool, following: str) -> bool:
    if token == _PAUSE or token in _BREAKS:
        return True
    if token.endswith("ly") and len(token) > 4 and token not in _LY_NOUNS | _LY_ADJECTIVES:
        return True
    noun_before = bool(run) and not _is_modifier(run[-1])
    if token in _ADJECTIVES:
        return False
    if _is_participle(token):
        if not _may_go_on(following):
            return True  # "a dog is sleeping", "a man riding a horse"
        if token.endswith("ed"):
            return False  # "sliced bread", "a snow covered field"
        # "A sleeping cat"; but "Riding horses", "a man riding horses".
        return noun_before or not (run or opened)
    if token in _VERB_FORMS:
        # "a dog sits", "dogs sit"; but "a walk", "the ski slope".
        return noun_before or not (opened or run)
    return False


def _may_go_on(word: str) -> bool:
    """Whether a noun phrase may go on with the word."""
    return word != _PAUSE and word not in _BREAKS and word not in _FRONT and not word.isdigit()
