import json
import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.config.positions import json_lines, key_of, path_of, toml_lines
from aquatint.config.template import to_toml

TRICKY = '''\
# a comment with a = 1
top = 1 # [not.a.table]
"quo\\"ted" . 'b c' = """
x = 4
[nope]
"""
[run] # hi
name = "a # not"
 folder='c:\\x'
prompts = [ # list
  "a, ] b",
  [1, 2], {x = 1, y.z = [3,
   4]},
]
[[data.sources]]
folder = "x"
  [data.sources.sub]
  k = 1979-05-27T07:32:00Z
[[data.sources]]
m = \'\'\'a'b\'\'\''
s = """a\\"""b"""""
q = 1
'''


def paths(value, path=()):
    """Every path in nested tables and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path} if path else set()
    for key, child in children:
        found |= paths(child, (*path, key))
    return found


def test_every_key_of_a_tricky_toml_has_the_line_it_stands_on():
    lines = toml_lines(TRICKY)
    assert set(lines) == paths(tomllib.loads(TRICKY))
    rows = TRICKY.splitlines()
    for path, line in lines.items():
        if isinstance(path[-1], str) and path[-1] not in ("data", "sources"):
            assert path[-1].replace('"', '\\"') in rows[line - 1], path
    assert lines["run", "prompts", 2, "y", "z", 1] == 13
    assert (lines["data", "sources", 0], lines["data", "sources", 1]) == (15, 19)


def test_windows_line_ends_count_once():
    assert toml_lines("a = 1\r\n\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


def test_an_empty_text_has_no_lines():
    assert toml_lines("") == toml_lines("# nothing") == json_lines("{}") == {}


SCALARS = st.one_of(st.text(max_size=8), st.integers(-5, 5), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))
LISTS = st.lists(SCALARS, max_size=3)
KEYS = st.from_regex(r"[a-z_][a-z0-9_-]{0,5}", fullmatch=True)
SECTIONS = st.dictionaries(KEYS, st.dictionaries(KEYS, SCALARS | LISTS, max_size=4), max_size=4)


@settings(max_examples=60, deadline=None)
@given(SECTIONS, st.sampled_from(["\n", "\n\n# a = [ \" '\n", " # x ]\n"]))
def test_any_toml_is_scanned_as_the_parser_reads_it(sections, between):
    rows = [f"[{name}]{between}" + "".join(f"{key} = {to_toml(value)}{between}" for key, value in section.items())
            for name, section in sections.items()]  # fmt: skip
    text = "".join(rows)
    assert set(toml_lines(text)) == paths(tomllib.loads(text))


@settings(max_examples=60, deadline=None)
@given(SECTIONS, st.sampled_from([None, 2]))
def test_any_json_is_scanned_as_the_parser_reads_it(sections, indent):
    text = json.dumps(sections, indent=indent)
    lines = json_lines(text)
    assert set(lines) == paths(sections)
    rows = text.splitlines()
    assert all(json.dumps(path[-1]) in rows[line - 1] for path, line in lines.items() if isinstance(path[-1], str))


def test_keys_and_paths_turn_into_each_other():
    assert path_of("data.sources.0.folder") == ("data", "sources", 0, "folder")
    assert key_of(path_of("data.sources.0.folder")) == "data.sources.0.folder"
