"""BFCL's languages: Java and JavaScript literals, one by one, and against the official converters."""

import random
import re
import time

import pytest

from benchmarks.bfcl_languages import LISTS, TYPES, from_java, from_javascript

MUTATIONS = 5_000


# ---- literals
@pytest.mark.parametrize("text, kind, element, value", [
    ("-12", "short", None, -12), ("12L", "long", None, 12), ("12", "long", None, "12"),
    ("1.5f", "float", None, 1.5),
    ("1.5", "float", None, "1.5"), ("1.5", "double", None, 1.5), ("1e3", "double", None, 1000.0),
    ("1.", "double", None, "1."), ("true", "boolean", None, True), ("True", "boolean", None, "True"),
    ("'a'", "char", None, "'a'"), ('"a"', "String", None, '"a"'), ("7", "any", None, "7"),
    ('new String[]{"a", b}', "Array", "String", ['"a"', "b"]),
    ("new int[]{1, 2,}", "Array", "integer", [1, 2]),
    ("{1, 2}", "Array", "integer", "{1, 2}"),
    ('new ArrayList<>(Arrays.asList("a", "b"))', "ArrayList", "String", ["a", "b"]),
    ("new ArrayList<Integer>() {{ add(1); add(x); }}", "ArrayList", "integer", [1, "x"]),
    ("new ArrayList<Integer>()", "ArrayList", "integer", []), ("[1]", "ArrayList", "integer", "[1]"),
    ('new HashMap<String, Object>() {{ put("a", 1); put("b", "x"); put("c", 2L); put("d", y); }}',
     "HashMap", None, {"a": 1, "b": "x", "c": 2, "d": "y"}),
    ("new HashMap<>() { {  } }", "HashMap", None, {}), ("new HashMap<>()", "HashMap", None, {}),
    ('Map.of("a", 1)', "HashMap", None, 'Map.of("a", 1)')])
def test_java_literals(text, kind, element, value):
    assert repr(from_java(text, kind, element)) == repr(value)


@pytest.mark.parametrize("text, kind, element, value", [
    ("'a'", "String", None, "a"), ("a", "String", None, "a"), ('"a\'', "String", None, '"a\''),
    ("'", "String", None, ""),
    ("5", "integer", None, 5), ("5.0", "integer", None, "5.0"), ("5", "float", None, 5.0),
    ("1e3", "float", None, "1e3"),
    ("5n", "Bigint", None, 5), ("5", "Bigint", None, "5"), ("true", "Boolean", None, True),
    ("5", "any", None, "5"),
    ("[1, 2]", "array", "integer", [1, 2]), ("['a', b]", "array", "String", ["a", "b"]),
    ("[]", "array", "float", []),
    ("new Array(1, 2)", "array", "float", [1.0, 2.0]), ("(1, 2)", "array", "float", "(1, 2)"),
    ("[[1, 'a'], [true]]", "array", "float", [[1, "a"], [True]]),
    ("[[1],\n [2],\n [3]] x", "array", "float", [[1], [2], [3]]),
    ("[[1\n], [2]]", "array", "float", "[[1\n], [2]]"),
    ("new Array([1], [2])", "array", "float", [[1], [2]]), ("[[1], [2]", "array", "float", ["[1"]),
    ("{a: 1, 'b': \"x\", c: [1, 2], d: false}", "dict", None, {"a": 1, "b": "x", "c": [1, 2], "d": False}),
    ("{}", "dict", None, {}), ("{a: {b: 1}}", "dict", None, {"a": "{b: 1"}), ("x", "dict", None, "x")])
def test_javascript_literals(text, kind, element, value):
    assert repr(from_javascript(text, kind, element)) == repr(value)


def java(size):
    """Texts of about `size` characters that begin like a Java literal and do not end like one."""
    return ("new HashMap<>() {" + " " * size, "new HashMap<" * (size // 13), "new T[]{" * (size // 8),
            "7" * size, 'new HashMap<>() {{ put("' + '",' * (size // 4) + ")",
            "new ArrayList<>() {{" + " " * size, "new ArrayList<>() {{" + "add(" * (size // 5))


def javascript(size):
    """The same for JavaScript."""
    return ("[" + "[1]," * (size // 4), "new Array(" + "[1]," * (size // 4), "[[" + "]" * size, "[" * size,
            "[1," * (size // 3), "{" + "a:" * (size // 4) + "}", "{" + "a" * size + "}",
            "{" + "a, " * (size // 3) + "}")


def cpu_seconds(function, *arguments):
    start = time.thread_time()
    function(*arguments)
    return time.thread_time() - start


@pytest.mark.parametrize("read, texts, language", [
    (from_java, java, "java"), (from_javascript, javascript, "javascript")], ids=["java", "javascript"])
def test_a_literal_of_twice_the_length_takes_about_four_times_as_long_and_not_more(read, texts, language):
    """The official patterns take exponential or quartic time, sixteen times as long."""
    # Times below this are too short to be compared: that of one pass over 50,000 characters.
    least = min(cpu_seconds(re.findall, "[^x]", " " * 50_000) for _ in range(5))

    def read_as_every_type(text):
        for kind in TYPES[language]:
            read(text, kind, "integer")

    for half, full in zip(texts(2000), texts(4000), strict=True):
        halves, fulls = [], []
        # Several tries, because other work may share the core.
        while len(halves) < 7 and (not halves or min(fulls) > 6 * max(least, min(halves))):
            halves.append(cpu_seconds(read_as_every_type, half))
            fulls.append(cpu_seconds(read_as_every_type, full))
        assert min(fulls) <= 6 * max(least, min(halves)), half[:40]


def test_a_text_beyond_the_limit_is_no_literal():
    assert from_java("7" * 5000, "integer") == from_javascript("7" * 5000, "integer") == "7" * 5000


# ---- the official converters as an oracle
PIECES = {"java": """
new |HashMap|<|String, Object|>|()|(|{|}|{{|}}| |put(|put("|"|'|", |,|k|1|-2L|1.5f|2.5|true|));|;|)|1e3|_1|nan
ArrayList<>|Arrays.asList(|add(|new HashMap<>() {{|new ArrayList<>(Arrays.asList(|new ArrayList<>() {{
add("q");|new int[]{|new String[] {|[]|put("a", 1);|put("b", x);|add(3);""", "javascript": """
[|]|[[|]]|],[|], [|,|, | |{|}|:|: |a|'b'|"c"|1|2.5|-3n|true|new Array(|)|[1]|[1,2]|,[3]|'|"|{}
{a: 1|b: [1, 2]|c: 'x, y: z'|nan|1_0"""}
BEGINNINGS = {"java": ["", "new int[]{", "new HashMap<>() {{", "new ArrayList<>() {{",
                       "new ArrayList<>(Arrays.asList("],
              "javascript": ["", "[", "[[", "{", "{a: ", "new Array(", "new Array(["]}


def test_the_official_converters_agree_on_random_literals(monkeypatch, tmp_path):
    pytest.importorskip("bfcl_eval", reason="needs the official checker: pip install --no-deps bfcl-eval")
    # Otherwise the package creates folders where it is installed.
    monkeypatch.setenv("BFCL_PROJECT_ROOT", str(tmp_path))
    from bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter import java_type_converter
    from bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter import js_type_converter

    rng, read = random.Random(4), 0
    for _ in range(MUTATIONS):
        language = rng.choice(["java", "javascript"])
        ours, theirs = {"java": (from_java, java_type_converter),
                        "javascript": (from_javascript, js_type_converter)}[language]
        pieces = ["\n", *PIECES[language].replace("\n", "|").split("|")]
        text = "".join(rng.choice(pieces) for _ in range(rng.choice([1, 2, 3, 5, 8, 12])))
        text = rng.choice(BEGINNINGS[language]) + text + rng.choice(["", "}", "}}", "]", "]]", ")", "))"])
        kind = rng.choice(["array", "dict", "Array", "ArrayList", "HashMap", *TYPES[language]])
        kind = kind if kind in TYPES[language] else "any"
        element = rng.choice(["String", "integer", "float"]) if kind in LISTS[language] else None
        value = ours(text, kind, element)
        assert repr(value) == repr(theirs(text, kind, element)), (text, kind, element)
        read += value != text
    assert read > 0.05 * MUTATIONS, "many are literals"
