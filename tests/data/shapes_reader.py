"""Reads questions, statements and phrases about scenes and says what is true: from the JSON of a scene, nothing else.

Written without the code that makes them, so that the tests compare two opinions.
"""

import re

COLOURS = "red|green|blue|yellow|orange|purple|cyan|pink"
SHAPES = "circle|square|triangle|star"
THING = rf"(?:(?:small|large) )?(?:(?:{COLOURS}) )?(?:{SHAPES}|object)"
RELATION = "left of|right of|above|below"
NEUTRAL = "made of (?:wood|paper|glass|metal)|drawn by (?:a child|an artist)"


def found(scene, words):
    """The scene's objects that the words fit."""
    wanted = set(words.split()) - {"a", "an", "the", "object"}
    return [o for o in scene["objects"] if wanted <= {o["size"], o["colour"], o["shape"]}]


def the(scene, words):
    [thing] = found(scene, words)
    return thing


def offset(a, b):
    """From the centre of b to that of a, doubled."""
    return tuple(a["box"][i] + a["box"][i + 2] - b["box"][i] - b["box"][i + 2] for i in (0, 1))


def holds(a, relation, b):
    dx, dy = offset(a, b)
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return (along < 0) == (relation in ("left of", "above")) and abs(along) >= 1.5 * abs(across)


def leans(a, relation, b):
    """Whether a lies in that direction of b at all."""
    dx, dy = offset(a, b)
    return {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[relation]


def neighbour(scene, words, relation, anchor):
    """The one object that the words can mean in "WORDS RELATION the ANCHOR"."""
    other = the(scene, anchor)
    [thing] = [o for o in found(scene, words) if o is not other and leans(o, relation, other)]
    assert holds(thing, relation, other)
    return thing


def answer(scene, question):
    """The right answer; AssertionError or ValueError where there is not exactly one."""
    if question == "what color is the background":
        return scene["background_colour"]
    if m := re.fullmatch(rf"what (color|shape|size) is the ({THING})", question):
        return the(scene, m[2])[{"color": "colour"}.get(m[1], m[1])]
    if m := re.fullmatch(rf"what is ({RELATION}) the ({THING})", question):
        thing = neighbour(scene, "object", m[1], m[2])
        return f"{thing['colour']} {thing['shape']}"
    if m := re.fullmatch(rf"how many ({THING})s are there", question):
        return str(len(found(scene, m[1])))
    if m := re.fullmatch(rf"is there an? ({THING})", question):
        return "yes" if found(scene, m[1]) else "no"
    m = re.fullmatch(rf"is the ({THING}) ({RELATION}) the ({THING})", question)
    assert m, question
    a, b = the(scene, m[1]), the(scene, m[3])
    yes, no = holds(a, m[2], b), holds(b, m[2], a)
    assert yes != no  # one of the two, not aslant
    return "yes" if yes else "no"


def label(scene, sentence):
    """entailment, neutral or contradiction."""
    if m := re.fullmatch(rf"the ({THING}) (?:is|was) (?:{NEUTRAL})|the ({THING}) will move soon", sentence):
        assert the(scene, m[1] or m[2])
        return "neutral"
    if m := re.fullmatch(rf"there is a small {THING} behind the ({THING})", sentence):
        assert the(scene, m[1])["size"] == "large"  # or nothing could be hidden there
        return "neutral"
    if m := re.fullmatch(rf"there is an? ({THING})", sentence):
        true = bool(found(scene, m[1]))
    elif m := re.fullmatch(r"the background is (\w+)", sentence):
        true = scene["background_colour"] == m[1]
    elif m := re.fullmatch(rf"the ({THING}) is (\w+)", sentence):
        true = the(scene, m[1])["colour"] == m[2]
    else:
        m = re.fullmatch(rf"an? ({THING}) is ({RELATION}) an? ({THING})", sentence)
        assert m, sentence
        pairs = [(a, b) for a in found(scene, m[1]) for b in found(scene, m[3])]
        true = any(holds(a, m[2], b) for a, b in pairs)
        assert true or not any(leans(a, m[2], b) for a, b in pairs)  # false even for a generous reader
    return "entailment" if true else "contradiction"


def truth(left, right, sentence):
    """Whether the sentence holds of the two scenes."""
    side = {"left": left, "right": right}
    if m := re.fullmatch(rf"there is an? ({THING}) in the (left|right) image", sentence):
        return bool(found(side[m[2]], m[1]))
    if m := re.fullmatch(
        rf"the left image contains an? ({THING}) and the right image contains an? ({THING})", sentence
    ):
        return bool(found(left, m[1]) and found(right, m[2]))
    if m := re.fullmatch(r"the (left|right) image contains more objects than the (left|right) image", sentence):
        more, fewer = (len(side[s]["objects"]) for s in m.groups())
        assert more != fewer
        return more > fewer
    m = re.fullmatch(rf"(both images contain|exactly one image contains) an? ({THING})", sentence)
    assert m, sentence
    number = sum(bool(found(scene, m[2])) for scene in (left, right))
    return number == (2 if m[1].startswith("both") else 1)


def meant(scene, phrase):
    """The object that a phrase means."""
    if m := re.fullmatch(rf"the ({THING}) ({RELATION}) the ({THING})", phrase):
        return neighbour(scene, m[1], m[2], m[3])
    assert re.fullmatch(rf"the {THING}", phrase), phrase
    return the(scene, phrase)
