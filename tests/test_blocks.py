"""Block keys equal their definition; namespaces never mix; bad input is told apart by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core import _native
from flexkv_core.blocks import (
    KEY_FORMAT_VERSION,
    GrowingKeys,
    Namespace,
    _keys,
    block_keys,
    multimodal_extra,
)
from flexkv_core.errors import FlexKVError, KeyInputError, KeyTypeError
from flexkv_core.layout import Coverage, KVGroup, ModelSpec

ROOT = hashlib.sha256(b"a root").digest()
VECTORS = Path(__file__).parent / "vectors"
BOTH_PATHS = pytest.mark.parametrize("portable", [False, True], ids=["best", "portable"])


def by_hashlib(tokens: np.ndarray, block_size: int, start: bytes, extras: Any = None) -> np.ndarray:
    keys = []
    for i in range(len(tokens) // block_size):
        part = tokens[i * block_size : (i + 1) * block_size].astype("<i4").tobytes()
        start = hashlib.sha256(part + ((extras[i] or b"") if extras else b"") + start).digest()
        keys.append(start)
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def some_tokens(count: int, dtype: Any = np.int32) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 2**31, count, dtype=dtype)


class TestVectors:
    def test_the_file_is_what_its_script_makes(self) -> None:
        made = runpy.run_path(str(VECTORS / "make_block_keys.py"))["text"]()
        assert made == (VECTORS / "block_keys.json").read_text()

    @BOTH_PATHS
    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_keys_equal_the_published_vectors(self, dtype: Any, portable: bool) -> None:
        published = json.loads((VECTORS / "block_keys.json").read_text())
        assert published["key_format_version"] == KEY_FORMAT_VERSION
        for case in published["cases"]:
            tokens = np.array(case["tokens"], dtype)
            extras = case["extras"] and [bytes.fromhex(extra) for extra in case["extras"]]
            root = bytes.fromhex(case["root"])
            keys = _keys(tokens, case["block_size"], root, None, extras, portable=portable)
            assert [row.tobytes().hex() for row in keys] == case["keys"]


@st.composite
def prefixes(draw: st.DrawFn) -> tuple[np.ndarray, int, list[bytes | None] | None]:
    block_size = draw(st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 100, 512])))
    blocks = draw(st.integers(0, 12))
    count = block_size * blocks + draw(st.integers(0, block_size - 1))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    tokens = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 2**31, count, dtype=dtype)
    one = st.one_of(st.none(), st.binary(max_size=200))
    extras = draw(st.one_of(st.none(), st.lists(one, min_size=blocks, max_size=blocks)))
    return tokens, block_size, extras


class TestBlockKeys:
    @BOTH_PATHS
    @given(prefix=prefixes())
    def test_equals_hashlib(self, portable: bool, prefix: Any) -> None:
        tokens, block_size, extras = prefix
        keys = _keys(tokens, block_size, ROOT, None, extras, portable=portable)
        assert keys.dtype == np.uint8
        np.testing.assert_array_equal(keys, by_hashlib(tokens, block_size, ROOT, extras))

    @given(prefix=prefixes(), data=st.data())
    def test_previous_continues_a_prefix(self, prefix: Any, data: st.DataObject) -> None:
        tokens, block_size, extras = prefix
        whole = block_keys(tokens, block_size, ROOT, extras=extras)
        cut = data.draw(st.integers(0, len(whole)))
        previous = whole[cut - 1] if cut else None
        if previous is not None and data.draw(st.booleans()):
            previous = previous.tobytes()
        rest = block_keys(tokens[cut * block_size :], block_size, ROOT, previous, extras[cut:] if extras else None)
        np.testing.assert_array_equal(rest, whole[cut:])

    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_any_stride(self, dtype: Any) -> None:
        grid = some_tokens(300, dtype).reshape(100, 3)
        for view in (grid[:, 1], grid.ravel()[::-1], grid.ravel()[5::7]):
            np.testing.assert_array_equal(block_keys(view, 4, ROOT), by_hashlib(view, 4, ROOT))

    def test_read_only_tokens(self) -> None:
        tokens = some_tokens(64)
        tokens.flags.writeable = False
        np.testing.assert_array_equal(block_keys(tokens, 16, ROOT), by_hashlib(tokens, 16, ROOT))

    @pytest.mark.parametrize("count", [0, 15])
    def test_no_complete_block(self, count: int) -> None:
        assert block_keys(some_tokens(count), 16, ROOT).shape == (0, 32)

    def test_a_bad_token_in_the_remainder_is_ignored(self) -> None:
        tokens = np.append(some_tokens(16), np.int32(-1))
        np.testing.assert_array_equal(block_keys(tokens, 16, ROOT), by_hashlib(tokens, 16, ROOT))

    def test_an_empty_extra_is_none(self) -> None:
        tokens = some_tokens(32)
        plain = block_keys(tokens, 16, ROOT)
        np.testing.assert_array_equal(block_keys(tokens, 16, ROOT, extras=[b"", None]), plain)

    def test_threads_do_not_disturb_each_other(self) -> None:
        tokens = some_tokens(16 * 5000)
        expected = block_keys(tokens, 16, ROOT)
        results: list[Any] = [None] * 4

        def work(i: int) -> None:
            results[i] = [block_keys(tokens, 16, ROOT) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all((keys == expected).all() for each in results for keys in each)


class TestErrors:
    @BOTH_PATHS
    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    @pytest.mark.parametrize("block_size", [4, 16, 48])
    @pytest.mark.parametrize("position", [0, 17, 95])
    def test_a_negative_token(self, position: int, block_size: int, dtype: Any, portable: bool) -> None:
        tokens = some_tokens(96, dtype)
        tokens[position] = -7
        with pytest.raises(KeyInputError, match=rf"tokens\[{position}\] is -7:"):
            _keys(tokens, block_size, ROOT, None, None, portable=portable)

    @pytest.mark.parametrize("value", [2**31, 2**32, 2**32 + 5, 2**63 - 1, -(2**63), -(2**32)])
    def test_a_token_beyond_int32(self, value: int) -> None:
        tokens = some_tokens(64, np.int64)
        tokens[33] = value
        with pytest.raises(KeyInputError, match=rf"tokens\[33\] is {value}:"):
            block_keys(tokens, 16, ROOT)

    def test_the_first_of_several_bad_tokens_is_named(self) -> None:
        tokens = some_tokens(160)
        tokens[[40, 41, 150]] = -1
        with pytest.raises(KeyInputError, match=r"tokens\[40\]"):
            block_keys(tokens, 16, ROOT)

    @pytest.mark.parametrize("dtype", ["?", "f4", "f8", "u1", "u4", "u8", "i1", "i2", ">i4", ">i8", "O"])
    def test_other_dtypes(self, dtype: str) -> None:
        with pytest.raises(KeyTypeError, match=r"tokens has dtype .* use int32 or int64"):
            block_keys(np.zeros(32, dtype), 16, ROOT)

    @pytest.mark.parametrize("tokens", [[1, 2, 3], (1, 2), range(4), b"1234", None])
    def test_not_an_array(self, tokens: Any) -> None:
        with pytest.raises(KeyTypeError, match=r"np\.asarray\(tokens, np\.int32\)"):
            block_keys(tokens, 2, ROOT)

    @pytest.mark.parametrize("shape", [(), (4, 4)])
    def test_not_one_dimension(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(KeyInputError, match="shape"):
            block_keys(np.zeros(shape, np.int32), 2, ROOT)

    @pytest.mark.parametrize("block_size", [0, -1, 2**31])
    def test_block_size_value(self, block_size: int) -> None:
        with pytest.raises(KeyInputError, match=f"block_size is {block_size}"):
            block_keys(some_tokens(8), block_size, ROOT)

    @pytest.mark.parametrize("block_size", [1.0, "16", None, True])
    def test_block_size_type(self, block_size: Any) -> None:
        with pytest.raises(KeyTypeError, match="block_size is a"):
            block_keys(some_tokens(8), block_size, ROOT)

    def test_block_size_may_be_a_numpy_integer(self) -> None:
        tokens = some_tokens(32)
        np.testing.assert_array_equal(block_keys(tokens, np.int64(16), ROOT), by_hashlib(tokens, 16, ROOT))

    @pytest.mark.parametrize(
        ("digest", "error", "text"),
        [
            (b"short", KeyInputError, "has 5 bytes"),
            (ROOT + b"x", KeyInputError, "has 33 bytes"),
            (np.zeros(31, np.uint8), KeyInputError, "shape"),
            (np.zeros((1, 32), np.uint8), KeyInputError, "shape"),
            (np.zeros(32, np.int8), KeyTypeError, "dtype int8"),
            ("0" * 32, KeyTypeError, "is a str"),
        ],
    )
    @pytest.mark.parametrize("name", ["root", "previous"])
    def test_root_and_previous(self, name: str, digest: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=f"{name} .*{text}"):
            block_keys(some_tokens(8), 4, **{"root": ROOT, name: digest})

    @pytest.mark.parametrize(
        ("extras", "error", "text"),
        [
            ([], KeyInputError, "extras has 0 entries: pass 2"),
            ([None], KeyInputError, "extras has 1 entries: pass 2"),
            ([None] * 3, KeyInputError, "extras has 3 entries: pass 2"),
            ([None, "text"], KeyTypeError, r"extras\[1\] is a str"),
            (b"ab", KeyTypeError, "extras is a bytes"),
            (7, KeyTypeError, "extras is a int"),
        ],
    )
    def test_extras(self, extras: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            block_keys(some_tokens(9), 4, ROOT, extras=extras)

    def test_native_code_refuses_sizes_that_do_not_agree(self) -> None:
        tokens, out, none = some_tokens(32), np.empty((2, 32), np.uint8), np.empty(0, np.int64)
        for block_size, previous, offsets in [
            (17, ROOT, none),
            (0, ROOT, none),
            (16, ROOT[1:], none),
            (16, ROOT, np.array([0, 1])),
            (16, ROOT, np.array([0, 2, 1])),
        ]:
            with pytest.raises(ValueError, match="hash_blocks"):
                _native.hash_blocks(tokens, block_size, previous, b"x", offsets, out)


class TestGrowingKeys:
    @given(
        block_size=st.integers(1, 20),
        pieces=st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12),
    )
    def test_equals_one_call_and_hashes_every_token_once(self, block_size: int, pieces: list[tuple[int, bool]]) -> None:
        tokens = some_tokens(sum(count for count, _ in pieces))
        growing = GrowingKeys(ROOT, block_size)
        before, at, returned = _native.tokens_hashed(), 0, []
        for count, wide in pieces:
            piece = tokens[at : at + count]
            returned.append(growing.extend(piece.astype(np.int64) if wide else piece))
            at += count
        expected = by_hashlib(tokens, block_size, ROOT)
        np.testing.assert_array_equal(growing.keys, expected)
        np.testing.assert_array_equal(np.concatenate([np.empty((0, 32), np.uint8), *returned]), expected)
        assert _native.tokens_hashed() - before == len(expected) * block_size
        assert growing.tokens == len(tokens)

    def test_extras_belong_to_the_blocks_that_are_completed(self) -> None:
        tokens, extras = some_tokens(48), [b"a", b"bb", None]
        growing = GrowingKeys(ROOT, 16)
        assert len(growing.extend(tokens[:10])) == 0
        assert len(growing.extend(tokens[10:40], extras[:2])) == 2
        assert len(growing.extend(tokens[40:], extras[2:])) == 1
        np.testing.assert_array_equal(growing.keys, by_hashlib(tokens, 16, ROOT, extras))

    @pytest.mark.parametrize("extras", [None, [None]])
    def test_after_an_error_nothing_has_changed(self, extras: Any) -> None:
        tokens = some_tokens(64)
        growing = GrowingKeys(ROOT, 16)
        growing.extend(tokens[:20])
        broken = tokens[20:].copy()
        if extras is None:
            broken[30] = -1
        with pytest.raises(KeyInputError, match=r"tokens\[30\] is -1" if extras is None else "pass 3"):
            growing.extend(broken, extras)
        growing.extend(tokens[20:])
        np.testing.assert_array_equal(growing.keys, by_hashlib(tokens, 16, ROOT))

    def test_the_callers_array_may_be_reused(self) -> None:
        tokens, buffer = some_tokens(32), np.empty(8, np.int32)
        growing = GrowingKeys(ROOT, 16)
        for at in range(0, 32, 8):
            buffer[:] = tokens[at : at + 8]
            growing.extend(buffer)
        np.testing.assert_array_equal(growing.keys, by_hashlib(tokens, 16, ROOT))

    def test_keys_are_read_only_and_stay_as_they_were(self) -> None:
        tokens = some_tokens(16 * 100)
        growing = GrowingKeys(ROOT, 16)
        first = growing.extend(tokens[:160])
        with pytest.raises(ValueError, match="read-only"):
            first[0, 0] = 1
        growing.extend(tokens[160:])
        np.testing.assert_array_equal(first, growing.keys[:10])


PLAIN = Namespace(model="m", block_size=16, groups=(KVGroup(4096),))
OTHERS: dict[str, list[Any]] = {
    "model": ["n", "m ", "mm"],
    "block_size": [1, 17],
    "groups": [
        (KVGroup(8192),),
        (KVGroup(4096, Coverage.window(1)),),
        (KVGroup(4096, Coverage.window(2)),),
        (KVGroup(4096, Coverage("state")),),
        (KVGroup(4096, layout="x"),),
        (KVGroup(4096), KVGroup(4096)),
    ],
    "dtype": ["float16", ""],
    "engine": ["vllm"],
    "tensor_parallel": [2],
    "pipeline_parallel": [2],
    "lora": ["", "a"],
    "salt": ["", "a"],
    "epoch": [b"\0", b"a"],
}


class TestNamespace:
    def test_every_field_changes_the_root(self) -> None:
        assert set(OTHERS) == {field.name for field in dataclasses.fields(Namespace)}
        changed = [dataclasses.replace(PLAIN, **{name: value}) for name in OTHERS for value in OTHERS[name]]
        roots = {namespace.root for namespace in [PLAIN, *changed]}
        assert len(roots) == 1 + len(changed)

    def test_the_version_of_the_format_changes_the_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = PLAIN.root
        monkeypatch.setattr("flexkv_core.blocks.KEY_FORMAT_VERSION", KEY_FORMAT_VERSION + 1)
        assert dataclasses.replace(PLAIN).root != before

    def test_the_root_is_the_documented_encoding(self) -> None:
        def item(kind: str, payload: bytes) -> bytes:
            return kind.encode() + len(payload).to_bytes(8, "little") + payload

        def record(*pairs: tuple[str, bytes]) -> bytes:
            return item("l", b"".join(item("s", name.encode()) + value for name, value in pairs))

        group = record(
            ("block_bytes", item("i", b"4096")),
            ("coverage", item("s", b"window")),
            ("coverage_blocks", item("i", b"3")),
            ("layout", item("s", b"opaque")),
        )
        expected = record(
            ("version", item("i", b"1")),
            ("model", item("s", "é".encode())),
            ("block_size", item("i", b"16")),
            ("groups", item("l", group)),
            ("dtype", item("s", b"bfloat16")),
            ("engine", item("s", b"")),
            ("tensor_parallel", item("i", b"1")),
            ("pipeline_parallel", item("i", b"1")),
            ("lora", item("N", b"")),
            ("salt", item("s", b"t")),
            ("epoch", item("b", b"\1\2")),
        )
        group_of_model = KVGroup(4096, Coverage.window(3))
        namespace = Namespace("é", 16, (group_of_model,), salt="t", epoch=b"\1\2")
        assert namespace.encoding == expected
        assert namespace.root == hashlib.sha256(expected).digest()

    @given(
        left=st.tuples(st.none() | st.text(max_size=4), st.none() | st.text(max_size=4), st.text(max_size=4)),
        right=st.tuples(st.none() | st.text(max_size=4), st.none() | st.text(max_size=4), st.text(max_size=4)),
    )
    def test_texts_do_not_run_into_each_other(self, left: Any, right: Any) -> None:
        roots = [
            dataclasses.replace(PLAIN, lora=lora, salt=salt, engine=engine).root for lora, salt, engine in (left, right)
        ]
        assert (roots[0] == roots[1]) == (left == right)

    @given(st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=3), min_size=2, max_size=2))
    def test_lists_do_not_run_into_each_other(self, layouts: list[list[str]]) -> None:
        roots = [
            dataclasses.replace(PLAIN, groups=tuple(KVGroup(1, layout=name) for name in names)).root
            for names in layouts
        ]
        assert (roots[0] == roots[1]) == (layouts[0] == layouts[1])

    def test_lora_a_is_not_salt_a(self) -> None:
        assert dataclasses.replace(PLAIN, lora="a").root != dataclasses.replace(PLAIN, salt="a").root

    def test_of_a_model_takes_every_field(self) -> None:
        spec = ModelSpec("m", 4, (KVGroup(1), KVGroup(2)), "fp8", "e", 2, 3, "l", "s")
        namespace = Namespace.of(spec, b"epoch")
        for field in dataclasses.fields(ModelSpec):
            assert getattr(namespace, field.name) == getattr(spec, field.name)
        assert namespace.epoch == b"epoch"
        assert Namespace.of(spec) == dataclasses.replace(namespace, epoch=b"")

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("model", "", KeyInputError),
            ("model", "\ud800", KeyInputError),
            ("model", b"m", KeyTypeError),
            ("dtype", None, KeyTypeError),
            ("engine", 1, KeyTypeError),
            ("lora", b"a", KeyTypeError),
            ("salt", 5, KeyTypeError),
            ("block_size", 0, KeyInputError),
            ("block_size", 16.0, KeyTypeError),
            ("block_size", True, KeyTypeError),
            ("tensor_parallel", -1, KeyInputError),
            ("pipeline_parallel", "2", KeyTypeError),
            ("groups", (), KeyInputError),
            ("groups", (KVGroup(1),) * 256, KeyInputError),
            ("groups", [KVGroup(1)], KeyTypeError),
            ("groups", (KVGroup(1), 4096), KeyTypeError),
            ("epoch", "e", KeyTypeError),
            ("epoch", None, KeyTypeError),
        ],
    )
    def test_errors_name_the_field(self, field: str, value: Any, error: type[FlexKVError]) -> None:
        with pytest.raises(error, match=rf"^{field}"):
            dataclasses.replace(PLAIN, **{field: value})


class TestMultimodalExtra:
    @given(st.lists(st.binary(min_size=1, max_size=4), max_size=4), st.lists(st.binary(min_size=1), max_size=4))
    def test_joined_identities_do_not_run_into_each_other(self, left: list[bytes], right: list[bytes]) -> None:
        joined = [b"".join(map(multimodal_extra, identities)) for identities in (left, right)]
        assert (joined[0] == joined[1]) == (left == right)

    def test_changes_the_key(self) -> None:
        tokens = some_tokens(16)
        with_image = block_keys(tokens, 16, ROOT, extras=[multimodal_extra(b"image")])
        assert (with_image != block_keys(tokens, 16, ROOT)).any()

    @pytest.mark.parametrize(("identity", "error"), [(b"", KeyInputError), ("x", KeyTypeError)])
    def test_errors_name_the_identity(self, identity: Any, error: type[FlexKVError]) -> None:
        with pytest.raises(error, match=r"^identity is"):
            multimodal_extra(identity)
