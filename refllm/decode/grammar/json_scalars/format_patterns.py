r"""The patterns of JSON Schema's string formats, as the checkers of ``jsonschema`` define them.

Regular expressions of Python's dialect (``\d`` is any decimal digit of Unicode), matched against
the whole string. Where a checker's own expression ends with ``$``, a final line end is accepted.
``formats.py`` says which format means which pattern.

| formats | defined by |
|---|---|
| date, time, date-time | ``date.fromisoformat``, ``strptime("%H:%M:%S")``, rfc3339-validator |
| duration | isoduration |
| hostname, idn-hostname | fqdn, idna |
| ipv4, ipv6 | ``ipaddress`` |
| uri, iri and their references | rfc3987 (the grammars of RFC 3986 and RFC 3987) |
| uri-template | uri-template (RFC 6570 and its own extensions) |
| json-pointer, relative-json-pointer | jsonpointer |
| uuid, color | ``uuid.UUID``, webcolors (CSS 3 names) |
"""

from __future__ import annotations

# --- dates and times --------------------------------------------------------------------------

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"  # divisible by 4, and not 00
_LEAP_YEAR = f"(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
DATE_TIME = f"{DATE}[Tt]{_CLOCK}:[0-5][0-9](?:\\.[0-9]+)?(?:[Zz]|[+-]{_CLOCK})\\n?"


def clock_time(digit: str) -> str:
    """``strptime("%H:%M:%S")``, which also reads decimal digits beyond ASCII."""
    minute = f"(?:[0-5]{digit}|{digit})"
    return f"(?:2[0-3]|[01]{digit}|{digit}):{minute}:{minute}"


def duration(power: str) -> str:
    """ISO 8601 durations as isoduration reads them; ``power`` matches an exponent's digits.

    Any component may be a decimal with an exponent. Weeks stand alone or after zeros. A number
    without a designator may stand before the T if it is not the first, or has a comma.
    """
    exponent = f"(?:[eE][+-]?{power})?"
    number = f"[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+){exponent}"
    zero = f"[+-]?(?:0+(?:[.,]0*)?|[.,]0+){exponent}"
    days = _some(number, "YMD")
    weeks = f"(?:{zero}Y)?(?:{zero}M)?(?:{zero}D)?{number}W"
    date = f"(?:{days}|{weeks})"
    rest = "[-+0-9.,eE]*"
    before = f"(?:{date}{rest}|{rest},{rest})?"
    return f"[+-]?P(?:{date}|{before}T{_some(number, 'HMS')})"


def _some(number: str, letters: str) -> str:
    """At least one of three components, in order."""
    first, second, third = (f"{number}{letter}" for letter in letters)
    return f"(?:{first}(?:{second})?(?:{third})?|{second}(?:{third})?|{third})"


# --- hosts ------------------------------------------------------------------------------------


def hostname(letter: str) -> str:
    """Labels of up to 63 characters, RFC 1035 §2.3.1; ``letter`` matches a letter or digit."""
    label = f"{letter}(?:(?:{letter}|-){{0,61}}{letter})?"
    return f"(?:{label}\\.)*{label}\\.?\\n?"


HOSTNAME_LENGTH = 253
LETTER = "[A-Za-z0-9]"
# Python ignores case and knows more digits: ı, ſ, the sign of kelvin, digits of other scripts.
POSSIBLE_LETTER = "[A-Za-z0-9]|[^\\x00-\\x7f]"

# No label has hyphens at its third and fourth place: those are encoded ones (xn--).
_IDN_LABEL = "(?!..--)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
IDN_HOSTNAME = f"(?:{_IDN_LABEL}\\.)*{_IDN_LABEL}\\.?"

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"


def ipv6(ipv4: str) -> str:
    """IPv6 addresses, RFC 3986 §3.2.2, whose last 32 bits may be written as ``ipv4``."""
    group = "[0-9A-Fa-f]{1,4}"
    last = f"(?:{group}:{group}|{ipv4})"
    forms = [f"(?:{group}:){{6}}{last}"]
    for before in range(7):
        left = f"(?:(?:{group}:){{0,{before - 1}}}{group})?" if before else ""
        right = f"(?:{group}:){{{5 - before}}}{last}" if before < 6 else group
        forms.append(f"{left}::{right}")
    forms.append(f"(?:(?:{group}:){{0,6}}{group})?::")
    return f"(?:{'|'.join(forms)})"


IPV6 = ipv6(IPV4)

# --- URIs and IRIs ----------------------------------------------------------------------------

_PERCENT = "%[0-9A-Fa-f]{2}"
_UNRESERVED = "A-Za-z0-9._~-"
_DELIMITERS = "!$&'()*+,;="
# Characters of IRIs beyond ASCII (RFC 3987 §2.2): ucschar, and iprivate in queries.
_UNICODE = "\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef" + "".join(
    f"{chr(plane << 16 | (0x1000 if plane == 0xE else 0))}-{chr(plane << 16 | 0xFFFD)}"
    for plane in range(1, 0xF)
)
_PRIVATE = "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"
# Within brackets octets may have leading zeros.
_LOOSE_OCTET = "(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_LOOSE_IPV4 = rf"(?:{_LOOSE_OCTET}\.){{3}}{_LOOSE_OCTET}"


def reference(*, relative: bool, international: bool) -> str:
    """URIs (RFC 3986) or IRIs (RFC 3987), with ``relative`` also references relative to one."""
    more = _UNICODE if international else ""
    private = _PRIVATE if international else ""

    def of(extra: str) -> str:
        return f"(?:[{extra}{_DELIMITERS}{more}{_UNRESERVED}]|{_PERCENT})"

    char = of(":@")
    future = f"v[0-9A-Fa-f]+\\.[:{_DELIMITERS}{_UNRESERVED}]+"
    host = f"(?:\\[(?:{ipv6(_LOOSE_IPV4)}|{future})\\]|{of('')}*)"
    authority = f"(?:{of(':')}*@)?{host}(?::[0-9]*)?"
    rest = f"(?:/{char}*)*"
    # Paths after an authority, from the root, or from a first segment; or none.
    rooted = f"//{authority}{rest}|/(?:{char}+{rest})?"
    absolute = f"[A-Za-z][A-Za-z0-9+.-]*:(?:{rooted}|{char}+{rest})?"
    tail = f"(?:\\?(?:[/?{private}]|{char})*)?(?:#(?:[/?]|{char})*)?\\n?"
    if not relative:
        return absolute + tail
    return f"(?:{absolute}|(?:{rooted}|{of('@')}+{rest})?){tail}"


def _variable(default: str) -> str:
    """One variable of a URI template, with its length or explode modifier and default value."""
    name = f"[A-Za-z0-9_](?:[A-Za-z0-9_./]|{_PERCENT})*"
    length = ":(?:[1-9][0-9]{0,2}|0[1-9][0-9]?|00[1-9])"
    return f"{name}(?:{length}|\\*|\\[\\])?{default}"


_ANY_DEFAULT = _variable("(?:=[^,}]*)?")
_LINE_DEFAULT = _variable("(?:=[^,}\\n]*)?")
_EXPRESSIONS = (
    f"(?:[+#./;?&,]|,\\+){_ANY_DEFAULT}(?:,{_ANY_DEFAULT})*[,./;&]?",
    f"{_LINE_DEFAULT}(?:,{_LINE_DEFAULT})*[,./;&]?",
    # Without an operator only the last character may be a line end.
    f"(?:{_LINE_DEFAULT},)*" + _variable("=[^,}\\n]*\\n"),
)
URI_TEMPLATE = f"(?:[^{{}}]|\\{{(?:{'|'.join(_EXPRESSIONS)})\\}})*"

# --- pointers, identifiers, colors, regular expressions ---------------------------------------

JSON_POINTER = "(?:/(?:[^~/]|~[01])*)*"
# A 0 may only be the last digit, as jsonschema reads the number.
RELATIVE_JSON_POINTER = f"[1-9]*[0-9](?:#|{JSON_POINTER})"
_OTHER = "[^\\x00-\\x7f]"  # a digit of another script, perhaps
POSSIBLE_RELATIVE_JSON_POINTER = f"(?:[1-9]|{_OTHER})*(?:[0-9]|{_OTHER})(?:#|{JSON_POINTER})"

UUID = "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
# Whatever uuid.UUID removes (braces, further hyphens, "urn:"), 32 characters and 4 hyphens remain.
POSSIBLE_UUID = r"[\s\S]{8}-[\s\S]{4}-[\s\S]{4}-[\s\S]{4}-[\s\S]{12,}"

_COLORS = """
aliceblue antiquewhite aqua aquamarine azure beige bisque black blanchedalmond blue blueviolet
brown burlywood cadetblue chartreuse chocolate coral cornflowerblue cornsilk crimson cyan darkblue
darkcyan darkgoldenrod darkgray darkgreen darkgrey darkkhaki darkmagenta darkolivegreen darkorange
darkorchid darkred darksalmon darkseagreen darkslateblue darkslategray darkslategrey darkturquoise
darkviolet deeppink deepskyblue dimgray dimgrey dodgerblue firebrick floralwhite forestgreen
fuchsia gainsboro ghostwhite gold goldenrod gray green greenyellow grey honeydew hotpink indianred
indigo ivory khaki lavender lavenderblush lawngreen lemonchiffon lightblue lightcoral lightcyan
lightgoldenrodyellow lightgray lightgreen lightgrey lightpink lightsalmon lightseagreen
lightskyblue lightslategray lightslategrey lightsteelblue lightyellow lime limegreen linen magenta
maroon mediumaquamarine mediumblue mediumorchid mediumpurple mediumseagreen mediumslateblue
mediumspringgreen mediumturquoise mediumvioletred midnightblue mintcream mistyrose moccasin
navajowhite navy oldlace olive olivedrab orange orangered orchid palegoldenrod palegreen
paleturquoise palevioletred papayawhip peachpuff peru pink plum powderblue purple red rosybrown
royalblue saddlebrown salmon sandybrown seagreen seashell sienna silver skyblue slateblue
slategray slategrey snow springgreen steelblue tan teal thistle tomato turquoise violet wheat
white whitesmoke yellow yellowgreen
"""


def _any_case(name: str) -> str:
    """A name in any case; the sign of kelvin is a k in upper case."""
    return "".join(f"[{letter}{letter.upper()}]" for letter in name).replace("[kK]", "[kK\u212a]")


COLOR = "#(?:[0-9A-Fa-f]{3}){1,2}\\n?|" + "|".join(map(_any_case, _COLORS.split()))

REGEX_DEPTH = 3  # nested groups


def regex_subset(depth: int = REGEX_DEPTH) -> str:
    """Regular expressions that ``re.compile`` accepts for certain.

    Left out: named groups, backreferences, lookbehind, flags, counts of more than two digits, and
    groups nested deeper than ``depth``, most ranges of characters.
    """
    escape = r"\\(?:[dDsSwWnrtfva]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\x00-\x7f]|[!-/:-@[-`{-~])"
    anchor = r"(?:\^|\$|\\[bBAZ])"
    # Ranges that begin with the first or end with the last digit or letter of their kind.
    ranges = "0-[0-9]|1-[1-9]|[0-9]-9|a-[a-z]|[a-z]-z|A-[A-Z]|[A-Z]-Z"
    member = rf"(?:{ranges}|{escape}|[^-\\\]\[&~|^])"
    members = rf"\[\^?{member}(?:{member}|\^)*-?\]"
    counts = "|".join(f"{first},[{first}-9]" for first in "0123456789")
    repeat = rf"\{{(?:[0-9]{{1,2}},?|,[0-9]{{1,2}}|{counts}|[0-9],[1-9][0-9])\}}"
    quantifier = f"(?:[*+?]|{repeat})[?+]?"
    atom = single = rf"(?:[^\\()\[{{*+?|^$]|{escape}|{members})"
    for _ in range(depth):
        inside = rf"(?:{atom}(?:{quantifier})?|{anchor}|\|)*"
        atom = rf"(?:{single}|\((?:\?[:=!])?{inside}\))"
    return rf"(?:{atom}(?:{quantifier})?|{anchor}|\|)*"
