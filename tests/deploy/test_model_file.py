"""Files that are no model, or a damaged one: the library says in one clause why it refuses them.

tests/native/fuzz_model_file.py feeds it what nobody thought of.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from advkd import runtime
from advkd.deploy.model_file import model_bytes
from advkd.ops import extension

sys.path.insert(0, str(Path(__file__).resolve().parent))
import library
from library import FORMAT, Model, Refused

pytestmark = [
    pytest.mark.skipif(extension is None, reason="the C++ extension is not installed"),
    pytest.mark.skipif(library.missing() is not None, reason=library.missing() or ""),
]

LEFT = 400 << 20  # bytes of address space that opening may take, beside what the program has
SECONDS = 20.0  # for one file, on a loaded machine
LONGEST_HEADER = 1 << 20

# Opens each file named by an argument after the first two, the library and the bytes of address
# space that are left, and prints status and words of each.
CHILD = """
import ctypes, re, resource, sys
loaded = ctypes.CDLL(sys.argv[1])
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
for path in sys.argv[3:]:
    model, error = ctypes.c_void_p(), ctypes.create_string_buffer(256)
    print(loaded.advkd_open_file(path.encode(), ctypes.byref(model), error), error.value.decode())
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library with the portable kernels, which are soon built."""
    folder = library.build(
        tmp_path_factory.mktemp("portable"), "-DADVKD_ISAS=portable", "-DADVKD_TOOLS=OFF",
        targets=("advkd",),
    )  # fmt: skip
    return folder / ("libadvkd.dylib" if sys.platform == "darwin" else "libadvkd.so")


@pytest.fixture(scope="module")
def content() -> bytes:
    return model_bytes(library.student("attention", 3))


@pytest.fixture(scope="module")
def rounded() -> bytes:
    """A file with weights of int8 and ranges of inputs."""
    return model_bytes(library.student("attention", 3), "int8")


class Parts:
    """A file taken apart, to be put together again with something changed."""

    def __init__(self, content: bytes):
        length = int.from_bytes(content[:8], "little")
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.plan: dict[str, Any] = json.loads(self.header["__metadata__"]["plan"])
        self.data = content[8 + length :]

    def bytes(self) -> bytes:
        self.header["__metadata__"]["plan"] = json.dumps(self.plan)
        return with_header(json.dumps(self.header).encode(), self.data)

    def op(self, kind: str, head: int = 0) -> dict[str, Any]:
        """The first operation of a kind."""
        found: dict[str, Any] = next(
            op for op in self.plan["heads"][head]["ops"] if op["kind"] == kind
        )
        return found

    def tensor(self, number: int = 0) -> dict[str, Any]:
        """A tensor's entry, in the order of their bytes."""
        entries = [e for name, e in self.header.items() if name != "__metadata__"]
        found: dict[str, Any] = sorted(entries, key=lambda e: e["data_offsets"])[number]
        return found


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def refusal(loaded: Path, content: bytes) -> str:
    """Why the library refuses a file, after checking that it says so decently and soon."""
    begun = time.perf_counter()
    with pytest.raises(Refused) as refused:
        Model(library.library(loaded), content)
    assert time.perf_counter() - begun < SECONDS
    assert refused.value.status == FORMAT
    words = refused.value.words
    assert 10 < len(words) < library.ERROR_SIZE and words.isprintable() and words[-1] != "."
    return words


def test_a_file_that_is_put_together_again_opens(loaded: Path, content: bytes) -> None:
    model = Model(library.library(loaded), Parts(content).bytes())
    assert model.info.heads == 3
    model.close()


GIT_LFS = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 1134246
"""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        (b"\0" * 8, "not JSON: it ends too early at byte 0"),
        (GIT_LFS, "no model file, or only a part of one"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 500, "no model file, or only a part of one"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "no model file"),
        (b"\xff" * 64, "no model file, or only a part of one"),
        (with_header(b"[]"), "tensors without a plan"),
        (with_header(b"{}"), "tensors without a plan"),
        (with_header(b'{"__metadata__": 3}'), "tensors without a plan"),
        (with_header(b'{"__metadata__": {"advkd": "1"}}'), "tensors without a plan"),
        (with_header(b'{"__metadata__": {"advkd": "1", "plan": {}}}'), "tensors without a plan"),
        (with_header(b'{"__metadata__": {"advkd": "1", "plan": "{}"}}'), "no proper 'size'"),
        (with_header(b'{"__metadata__": {"advkd": "1", "plan": "[]"}}'), "its plan is no object"),
        (with_header(b"{"), "not JSON: a member without a name at byte 1"),
        (with_header(b'{"a": tru}'), "not JSON: an unknown word at byte 10"),
        (with_header(b'{"a": 1, "a": 1}'), "not JSON: a repeated name at byte 12"),
        (with_header(b"[" * LONGEST_HEADER), "nested too deep at byte 33"),
        (with_header(b'{"a":' * 1000), "nested too deep"),
        (with_header(b" " * (LONGEST_HEADER + 1)), "no model file"),
        (with_header(b"1" * LONGEST_HEADER), "too many digits"),
        (with_header(b"01"), "a number that begins with 0"),
        (with_header(b'{"a": 1e99999999999999999999}'), "an exponent out of range"),
        (with_header(b'{"a": "\\ud800"}'), "half a surrogate pair"),
        (with_header(b'{"a": "\\udc00"}'), "half a surrogate pair"),
    ],
)
def test_what_is_no_model(loaded: Path, content: bytes, words: str) -> None:
    assert words in refusal(loaded, content)


def test_weights_without_a_plan(loaded: Path) -> None:
    state = {k: v.contiguous() for k, v in library.student("small").state_dict().items()}
    assert "advkd export --format advkd writes a model file" in refusal(loaded, save(state))


def test_a_file_cut_anywhere(loaded: Path, content: bytes) -> None:
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (8, 9, header // 2, header - 1):
        assert "only a part of one" in refusal(loaded, content[:size])
    for size in (header, header + 1, len(content) // 2, len(content) - 1):
        words = refusal(loaded, content[:size])
        assert "damaged" in words and ("out of bounds" in words or "too large" in words)
    assert "bytes follow its last tensor" in refusal(loaded, content + b"\0")


Change = Callable[[Parts], Any]


def set_at(*path: str | int, value: Any) -> Change:
    """A change of the member that a path through the plan leads to."""

    def change(parts: Parts) -> None:
        place: Any = parts.plan
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def of_op(kind: str, part: str, name: str, value: Any) -> Change:
    """A change of an operation's number or weight."""
    return lambda parts: parts.op(kind)[part].update({name: value})


def overlapping(parts: Parts) -> None:
    first, second = parts.tensor(0), parts.tensor(1)
    length = second["data_offsets"][1] - second["data_offsets"][0]
    begin = first["data_offsets"][1] - 4
    second["data_offsets"] = [begin, begin + length]


def swapped(parts: Parts) -> None:
    parts.tensor()["data_offsets"].reverse()


def all_at_one_place(parts: Parts) -> None:
    for buffer in parts.plan["heads"][-1]["buffers"]:
        buffer[0] = 0


def without_first_writer(parts: Parts) -> None:
    del parts.plan["heads"][0]["ops"][0]


def last_to_the_input(parts: Parts) -> None:
    parts.plan["heads"][0]["ops"][-1]["numbers"]["y"] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # The header.
        (
            lambda p: p.header["__metadata__"].update(advkd="3"),
            "of version '3', and only '1' and '2'",
        ),
        (lambda p: p.header["__metadata__"].update(advkd="9" * 999), "and only '1' and '2' are"),
        (lambda p: p.header["__metadata__"].update(advkd=1), "of version '', and only '1'"),
        (lambda p: p.tensor().update(dtype="BF16"), "is neither F32 nor F16 nor I8"),
        (lambda p: p.tensor().update(shape=[1 << 40, 1 << 40]), "is too large"),
        (lambda p: p.tensor().update(shape=[0]), "'shape' of tensor .* is out of bounds"),
        (lambda p: p.tensor().update(shape=[-1]), "'shape' of tensor .* is out of bounds"),
        (lambda p: p.tensor().update(shape=[1.0]), "'shape' of tensor .* is out of bounds"),
        (lambda p: p.tensor().update(shape=[1]), "has other bytes than its shape"),
        (lambda p: p.tensor().update(shape=[1] * 9), "has too many 'shape'"),
        (lambda p: p.tensor().update(data_offsets=[0]), "has no two offsets"),
        (lambda p: p.tensor().update(data_offsets=[0, 1 << 60]), "is out of bounds"),
        (swapped, "has other bytes than its shape"),
        (overlapping, "its tensors overlap or leave a gap"),
        (lambda p: p.header.update(more={}), "tensor 'more' has no proper 'dtype'"),
        # The plan as a whole.
        (set_at("size", value=0), "'size' of its plan is out of bounds"),
        (set_at("size", value=1 << 40), "'size' of its plan is out of bounds"),
        (set_at("size", value=4), "its images are of another size"),
        (set_at("channels", value=3), "its images are of another size"),
        (set_at("classes", value=1 << 40), "'classes' of its plan is out of bounds"),
        (set_at("classes", value=2), "it has not one name for each class"),
        (set_at("class_names", value=[1, 2, 3]), "the name of a class is no text"),
        (set_at("class_names", value=["a\0", "b", "c"]), "the name of a class has a zero in it"),
        (set_at("heads", value=[]), "it has no heads"),
        (set_at("heads", value={}), "its plan has no proper 'heads'"),
        (set_at("heads", value=[0] * 65), "too many 'heads'"),
        (set_at("heads", 0, "arena", value=-1), "'arena' of head 1 is out of bounds"),
        (set_at("heads", 0, "arena", value=1 << 50), "'arena' of head 1 is out of bounds"),
        (set_at("heads", 0, "arena", value=10**30), "head 1 has no proper 'arena'"),
        (set_at("heads", 0, "arena", value=16), "does not lie in the arena"),
        (set_at("heads", 0, "buffers", value=[]), "it has no input and output"),
        (set_at("heads", 0, "buffers", 2, value=[0, 1]), "is not three numbers"),
        (set_at("heads", 0, "buffers", 2, value=[8, 1, 16]), "does not lie in the arena"),
        (set_at("heads", 0, "buffers", 0, value=[16, 64, 1]), "buffer 0 has an offset"),
        (set_at("heads", 0, "buffers", 2, value=[0, 1 << 40, 1]), "an impossible shape"),
        (set_at("heads", 0, "ops", value=[]), "nothing writes the whole output"),
        (all_at_one_place, "buffers .* overlap"),
        (without_first_writer, "reads what nothing has written"),
        (last_to_the_input, "operation .* has (other pixels|fewer channels)|writes to the input"),
        # Operations.
        (set_at("heads", 0, "ops", 0, "kind", value="fft"), r"\(fft\): no operation of that kind"),
        (lambda p: p.op("attention").update(kind="fft"), r"\(fft\): there is no such kind"),
        (set_at("heads", 0, "ops", 0, "factor", value="1"), "no proper 'factor'"),
        (of_op("convolution", "numbers", "more", 1), "it has numbers that are not known"),
        (of_op("convolution", "numbers", "algorithm", 1), "names no algorithms"),
        (of_op("convolution", "numbers", "packed", 0), "it has 'packed' twice"),
        (of_op("convolution", "numbers", "kernel", 2), "no kernel serves such a convolution"),
        (of_op("convolution", "numbers", "kernel", 1 << 39), "kernel=.* is not between 1 and 3"),
        (of_op("convolution", "numbers", "in_channels", 1 << 20), "has another shape"),
        (of_op("convolution", "numbers", "height", 1 << 14), "has other pixels"),
        (of_op("convolution", "numbers", "x", 4096), "x=4096 is not between"),
        (of_op("convolution", "weights", "packed", "none"), "there is no tensor 'none'"),
        (of_op("convolution", "weights", "packed", 1), "is no tensor's name"),
        (
            of_op("convolution", "weights", "more", "none"),
            "no operation of that kind has a weight 'more'",
        ),
        (of_op("norm", "numbers", "groups", 3), "its groups do not divide the channels"),
        (of_op("attention", "numbers", "heads", 1 << 20), "a size overflows|fewer channels"),
        (lambda p: p.op("norm").update(factor=-1), "its eps is negative"),
        (lambda p: p.op("norm").update(factor=float("inf")), "not JSON: a number without digits"),
    ],
)
def test_what_is_damaged(loaded: Path, content: bytes, change: Change, words: str) -> None:
    parts = Parts(content)
    change(parts)
    said = refusal(loaded, parts.bytes())
    assert re.search(words, said), said


def renamed(was: str, becomes: str) -> Change:
    return lambda parts: parts.header.update({becomes: parts.header.pop(was)})


def with_floats(name: str, *values: float) -> Change:
    """A change of a tensor's first numbers."""

    def change(parts: Parts) -> None:
        begin = parts.header[name]["data_offsets"][0]
        new = struct.pack(f"<{len(values)}f", *values)
        parts.data = parts.data[:begin] + new + parts.data[begin + len(new) :]

    return change


def of_rounded(name: str, value: int) -> Change:
    """A change of a number of the first operation whose input is rounded."""

    def change(parts: Parts) -> None:
        ops = (op for op in parts.plan["heads"][0]["ops"] if "x_range" in op["numbers"])
        next(ops)["numbers"][name] = value

    return change


NAN, INF = float("nan"), float("inf")
SCALES = "submodules.0.blocks.0.conv1.weight.scale"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.header["__metadata__"].update(advkd="1"), "there is no such x_range"),
        (of_rounded("x_range", 99), "there is no such x_range"),
        (of_rounded("x_range", 1 << 40), "x_range=.* is not between 0 and"),
        (of_rounded("int8", 0), "its weights are no tensors"),
        (renamed("x_ranges", "x_rangez"), "there is no tensor 'x_ranges'"),
        (lambda p: p.header["x_ranges"].update(shape=[2, 9]), "has other bytes|no such x_range"),
        (lambda p: p.header["x_ranges"].update(dtype="F16"), "has other bytes than its shape"),
        (with_floats("x_ranges", 0.0, 0.0), "x_range is no range around 0"),
        (with_floats("x_ranges", 1.0, 2.0), "x_range is no range around 0"),
        (with_floats("x_ranges", -2.0, -1.0), "x_range is no range around 0"),
        (with_floats("x_ranges", 2.0, -2.0), "x_range is no range around 0"),
        (with_floats("x_ranges", NAN, 1.0), "x_range is no range around 0"),
        (with_floats("x_ranges", -1.0, NAN), "x_range is no range around 0"),
        (with_floats("x_ranges", -INF, 1.0), "x_range is no range around 0"),
        (with_floats("x_ranges", -3e38, 3e38), "x_range is no range around 0"),
        (with_floats("x_ranges", 0.0, 1e-40), "x_range is no range around 0"),
        (with_floats(SCALES, 0.0), "has a scale that is none"),
        (with_floats(SCALES, 1.0, -0.1), "has a scale that is none"),
        (with_floats(SCALES, NAN), "has a scale that is none"),
        (with_floats(SCALES, INF), "has a scale that is none"),
        (renamed(SCALES, "other"), "has no scale for each channel"),
    ],
)
def test_what_is_damaged_of_int8(loaded: Path, rounded: bytes, change: Change, words: str) -> None:
    """With products of float32, and of int8 where this processor has them."""
    parts = Parts(rounded)
    change(parts)
    said = refusal(loaded, parts.bytes())
    assert re.search(words, said), said
    with pytest.raises(runtime.ModelError, match=words):
        runtime.load(parts.bytes())


def test_only_weights_of_int8_have_inputs_that_are_rounded(loaded: Path, content: bytes) -> None:
    parts = Parts(content)
    begin = len(parts.data)
    parts.header["__metadata__"]["advkd"] = "2"
    parts.header["x_ranges"] = {
        "dtype": "F32", "shape": [1, 2], "data_offsets": [begin, begin + 8]
    }  # fmt: skip
    parts.data += struct.pack("<2f", -1.0, 1.0)
    Model(library.library(loaded), parts.bytes()).close()
    parts.op("convolution")["numbers"]["x_range"] = 0
    assert "its weights are not int8" in refusal(loaded, parts.bytes())


def test_numbers_without_bounds(loaded: Path, content: bytes) -> None:
    parts = Parts(content)
    parts.op("norm")["factor"] = 123456789
    file = parts.bytes()
    assert "its factor is not finite" in refusal(loaded, file.replace(b"123456789", b"1e0000400"))
    assert "an exponent out of range" in refusal(loaded, file.replace(b"123456789", b"1e9999999"))


def test_a_missing_tensor(loaded: Path, content: bytes) -> None:
    parts = Parts(content)
    last = parts.tensor(-1)
    name = next(name for name, entry in parts.header.items() if entry is last)
    del parts.header[name]
    parts.data = parts.data[: last["data_offsets"][0]]
    assert f"there is no tensor '{name[:60]}'" in refusal(loaded, parts.bytes())


def test_long_names_are_quoted_in_part(loaded: Path, content: bytes) -> None:
    parts = Parts(content)
    parts.op("convolution")["weights"]["packed"] = "x" * 5000
    assert f"there is no tensor '{'x' * 60}'" in refusal(loaded, parts.bytes())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded(loaded: Path, content: bytes, tmp_path: Path) -> None:
    """Files of 1 MiB that ask for as much as they can."""

    def plan_with(**members: Any) -> bytes:
        parts = Parts(content)
        parts.plan.update(members)
        return parts.bytes()

    head = Parts(content).plan["heads"][0]
    values = b"[" + b"0," * (LONGEST_HEADER // 2 - 2) + b"0]"
    objects = b"[" + b"{}," * (LONGEST_HEADER // 3 - 2) + b"0]"
    hostile = [
        with_header(values),
        with_header(objects),
        with_header(json.dumps({"__metadata__": {"advkd": "1", "plan": values.decode()}}).encode()),
        plan_with(classes=1 << 20, class_names=None),
        plan_with(heads=[head | {"buffers": [[0, 1, 1]] * 4096}] * 16),
        plan_with(heads=[head | {"arena": 1 << 40}]),
        plan_with(size=1 << 13),
    ]
    paths = []
    for number, file in enumerate(hostile):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(file)
    command = [sys.executable, "-c", CHILD, str(loaded), str(LEFT), *map(str, paths)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS * len(hostile)
    )
    assert done.returncode == 0, done.stderr
    statuses = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(statuses) == len(hostile)
    assert statuses == [FORMAT] * 5 + [library.OK] + [FORMAT], done.stdout
