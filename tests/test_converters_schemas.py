"""converters/schemas.py and runtime/json_types.py: forms of a tool list, and calls against their schemas."""

import json

import pytest

from converters.schemas import bare_tools, contradictions, contradictions_of, read_parameters
from data import Example, read_jsonl, read_toolace, read_xlam
from runtime.json_types import fits

BOOK = {"name": "book_room", "description": "Books a room", "parameters": {
    "type": "object", "properties": {"beds": {"type": "integer"}}, "required": ["beds"]}}
LIST = {"name": "list_rooms", "parameters": {"type": "object", "properties": {}}}

FORMS = {
    "bare": [BOOK, LIST],
    "enveloped": [{"type": "function", "function": tool} for tool in (BOOK, LIST)],
    "enveloped and strict": [{"type": "function", "function": {**tool, "strict": True}}
                             for tool in (BOOK, LIST)],
    "flat, as the Responses API has it": [{"type": "function", **tool, "strict": None}
                                          for tool in (BOOK, LIST)],
    "an object with a list": {"tools": [BOOK, {"type": "function", "function": LIST}]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_every_form_of_a_tool_list_gives_the_same_schemas(form, write):
    assert bare_tools(write(FORMS[form])) == [BOOK, LIST]


@pytest.mark.parametrize("form", FORMS)
def test_every_reader_takes_every_form(tmp_path, form):
    calls, path = [{"name": "list_rooms", "arguments": {}}], tmp_path / "file.json"
    example = Example("1", "s", FORMS[form], [{"role": "user", "content": "q"}], calls)
    path.write_text(json.dumps(vars(example)))
    assert read_jsonl(path)[0].tools == [BOOK, LIST]
    path.write_text(json.dumps([{"query": "q", "tools": FORMS[form], "answers": json.dumps(calls)}]))
    assert read_xlam(path)[0][0].tools == [BOOK, LIST]
    if isinstance(FORMS[form], list):  # ToolACE's system text holds a list
        turns = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "[list_rooms()]"}]
        system = f"Use these: {json.dumps(FORMS[form])} as you need."
        path.write_text(json.dumps([{"system": system, "conversations": turns}]))
        assert read_toolace(path)[0][0].tools == [BOOK, LIST]


def test_one_schema_is_a_list_of_one_and_a_schema_may_be_called_tools():
    odd = {"name": "tools", "tools": ["hammer"], "type": "workshop"}
    for form in (odd, [odd], {"function": odd}, json.dumps({"type": "function", "function": odd})):
        assert bare_tools(form) == [odd]


@pytest.mark.parametrize(
    "value, words",
    [
        ([], "empty"),
        ('{"tools": []}', "empty"),
        ("three tools", "not JSON"),
        ("[" * 50_000, "not JSON"),
        (17, "list of objects with a name"),
        ([{"name": True}], "list of objects with a name"),
        ([{"type": "function", "function": {"parameters": {}}}], "list of objects with a name"),
        ([{"type": "web_search"}], "list of objects with a name"),
        ([BOOK, "list_rooms"], "list of objects with a name"),
        ([{"name": "f", "parameters": {"x": {"default": float("-inf")}}}], "NaN"),
        ('[{"name": "f", "maximum": NaN}]', "NaN"),
        ([{"name": "f", "description": "half \udc00"}], "surrogate"),
    ],
)
def test_what_is_no_tool_list_is_refused_by_a_reason(value, words):
    with pytest.raises(ValueError, match=words):
        bare_tools(value)


def test_string_arguments_and_enveloped_answers_of_xlam_are_read(tmp_path):
    answers = [{"type": "function", "function": {"name": "book_room", "arguments": '{"beds": 2}'}}]
    (tmp_path / "x.json").write_text(json.dumps([{"query": "q", "tools": [BOOK], "answers": answers}]))
    assert read_xlam(tmp_path / "x.json")[0][0].answer == [{"name": "book_room", "arguments": {"beds": 2}}]


# ---- types


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        ("integer", [3, -4.0], ["3", 3.5, True, None]),
        ("int, optional", [3], ["3", None, [3]]),
        ("float", [3, 3.5], ["3.5", False]),
        ("List[str]", [[], ["a"]], ["a", [1], None]),
        ("List[List[int]]", [[[1], []]], [[1], [["1"]]]),
        ("Optional[Dict[str, List[int]]]", [None, {"k": [1]}], [{"k": 1}, []]),
        ("Union[int, str]", [1, "a"], [1.5, [1]]),
        ("Tuple[float, str], optional", [[1.0, "a"]], [[None], {}]),
        ("bool | None", [True, None], [0, "true"]),
        ("str or int", ["a", 2], [2.5]),
        (["string", "null"], ["a", None], [1]),
        ("dict", [{}], [[], "{}"]),
        ("Callable[[float], float]", ["f", 1, None], []),
        (None, ["f", 1, None], []),
    ],
)
def test_types_are_read_as_json_schema_and_as_xlam_writes_them(kind, right, wrong):
    assert [value for value in right if not fits(kind, value)] == []
    assert [value for value in wrong if fits(kind, value)] == []


# ---- calls against schemas

HOTEL = {"name": "hotel", "parameters": {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "stars": {"type": "integer", "enum": [3, 4, 5]},
        "guests": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
        "note": {"type": "string", "nullable": True},
        "filter": {"type": "object", "properties": {"pool": {"type": "boolean"}}, "required": ["pool"]},
        "class": {"type": "array", "enum": ["eco", "sea"]},
        "page": {"type": "int", "default": "first"},
    },
    "required": ["city"],
}}
FLAT = {"name": "flat", "parameters": {"a": {"type": "str"}, "b": {"type": "int, optional"},
                                       "c": {"type": "float", "default": ""}, "d": "int"}}


@pytest.mark.parametrize(
    "tool, arguments, reasons",
    [
        (HOTEL, {"city": "Rome", "stars": 4, "guests": ["Ann"], "note": None, "filter": {"pool": True}}, []),
        (HOTEL, {"city": "Rome", "class": ["sea"], "guests": 2, "page": "first"}, []),
        (HOTEL, {"city": 7}, ["wrong type"]),
        (HOTEL, {"city": "Rome", "guests": [1]}, ["wrong type"]),
        (HOTEL, {"city": "Rome", "filter": {"pool": "yes"}}, ["wrong type"]),
        (HOTEL, {"city": "Rome", "filter": {"sauna": True}},
         ["unknown parameter", "required parameter missing"]),
        (HOTEL, {"city": "Rome", "stars": 2}, ["not of the enum"]),
        (HOTEL, {"city": "Rome", "class": ["sea", "sky"]}, ["not of the enum"]),
        (HOTEL, {"town": "Rome"}, ["unknown parameter", "required parameter missing"]),
        (FLAT, {"a": "x", "b": 1, "c": 2}, []),
        (FLAT, {"a": "x"}, []),
        (FLAT, {"b": 1}, ["required parameter missing"]),
        (FLAT, {"a": "x", "d": "1", "e": 0}, ["wrong type", "unknown parameter"]),
        ({"name": "f"}, {"a": 1}, []),
        ({"name": "f", "parameters": ["a"]}, {"a": 1}, []),
        ({"name": "f", "parameters": "a: int"}, {"a": "1"}, []),
        ({"name": "f", "parameters": {"type": "object"}}, {"a": 1}, []),
        ({"name": "f", "parameters": {"type": "object", "properties": {}}}, {"a": 1}, ["unknown parameter"]),
        ({"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": True}},
         {"a": 1}, []),
    ],
)
def test_contradictions_are_found_by_reason(tool, arguments, reasons):
    assert sorted(contradictions({"name": tool["name"], "arguments": arguments}, tool)) == sorted(reasons)


@pytest.mark.parametrize("odd", [True, 5, "city", ["city", ["x"], None], {"city": 1}, None])
def test_a_schema_of_any_shape_is_read_without_a_traceback(odd):
    for keyword in ("type", "properties", "required", "enum", "anyOf", "items", "additionalProperties"):
        for schema in ({"properties": {"city": {keyword: odd}}}, {"city": {keyword: odd}},
                       {"type": "object", "properties": {"city": {"type": "string"}}, keyword: odd}):
            for value in (None, "x", [1], {"a": None}):
                contradictions({"name": "f", "arguments": {"city": value}}, {"parameters": schema})


def test_a_flat_schema_may_have_parameters_called_properties_and_type():
    schema = {"properties": {"type": "List[str]", "description": "d"}, "type": {"type": "int"}}
    assert read_parameters({"parameters": schema}) == (schema, ["properties", "type"], False)
    nested = {"properties": {"type": {"type": "string"}, "description": {}}}
    assert read_parameters({"parameters": nested}) == (nested["properties"], [], True)


def test_of_two_tools_with_one_name_the_fitting_one_counts():
    tools = [{"name": "f", "parameters": {"a": {"type": kind}}} for kind in ("int", "str", "bool")]
    assert contradictions_of(tools, [{"name": "f", "arguments": {"a": "x"}}]) == {}
    assert contradictions_of(tools, [{"name": "f", "arguments": {"a": []}}]).keys() == {"wrong type"}


# ---- real data


def test_58_answers_of_the_xlam_records_contradict_their_schemas(real_data):
    path = real_data / "data" / "xlam" / "xlam_columns_from_rlla.json"
    examples, report = read_xlam(path)
    assert len(examples) == 335 and len(report["contradictions"]) == 58 and report["nulls"] == 0
    examples, report = read_xlam(path, strict_schema=True)
    assert len(examples) == report["kept"] == 277 and list(report["dropped"].values()) == [58]


def test_no_answer_that_was_checked_against_its_schema_contradicts_it(real_data):
    for name in ("dria_pythonic", "toolalpaca", "toolbench"):
        for line in (real_data / "data" / "train_large" / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert contradictions_of(record["tools"], record["answer"]) == {}, record["id"]
