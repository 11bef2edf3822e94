"""Damaged and hostile adapters: refused with the file's name, in bounded time and memory, the model unchanged."""

import builtins
import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fuzz
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MLP
from torch import nn

import c3a_triton
from c3a_triton import C3AConfig, C3AError, CheckpointError, ConfigError
from c3a_triton.commands.folder_merge import merge_folder
from c3a_triton.commands.model_folder import INDEX_NAME
from c3a_triton.files import checkpoint, expressions
from c3a_triton.files.checkpoint import WEIGHTS_NAME, AdapterFile, read_adapter
from c3a_triton.files.config import CONFIG_NAME
from c3a_triton.files.model_card import CARD_NAME
from c3a_triton.files.patterns import unmatched_keys
from c3a_triton.operator import tuned
from c3a_triton.operator.tuned import Key, Times

NIGHTLY = bool(os.environ.get("NIGHTLY"))
GOOD = {"block_size": 6, "target_modules": ["first", "second"], "modules_to_save": ["norm"]}
KERNEL = "base_model.model.first.c3a_kernel"


def adapted(seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    return c3a_triton.apply(MLP(), C3AConfig(**(GOOD | {"init_weights": "gaussian"} | changes)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted().c3a.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def described(model: nn.Module) -> list[tuple[object, ...]]:
    return [
        *((name, type(module)) for name, module in model.named_modules()),
        *((name, parameter.requires_grad) for name, parameter in model.named_parameters()),
        *((name, value.numpy().tobytes()) for name, value in model.state_dict().items()),
        *((name, value.to_dict()) for name, value in model.c3a.adapters.items()),
    ]


def refused(folder: Path, error: type[C3AError] | tuple[type[C3AError], ...], message: str) -> None:
    """Neither an adapted model takes the folder, beside its adapter or in its place, nor a bare one."""
    model, bare = adapted(seed=1), MLP()
    before, classes = described(model), [type(module) for module in bare.modules()]
    for load in (
        lambda: c3a_triton.load_adapter(model, folder, "new"),
        lambda: model.c3a.hotswap_adapter(folder),
        lambda: c3a_triton.load_adapter(bare, folder),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(error, match=f"(?s){message}") as caught:
                load()
        assert len(str(caught.value)) < 5000
    assert described(model) == before
    assert [type(module) for module in bare.modules()] == classes
    assert not hasattr(bare, "c3a")


def edit(folder: Path, **changes: object) -> None:
    """Change fields of the configuration and take the weights' notes away, as a stranger would."""
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, metadata={"format": "pt"})


# Damage


def read(folder: Path) -> tuple[AdapterFile | None, str]:
    """What is read, or None and what this library says to it."""
    try:
        return read_adapter(folder), ""
    except (CheckpointError, ConfigError) as error:
        return None, str(error)


def flips(length: int, header: int) -> Iterator[tuple[int, int]]:
    """(position, bit): each byte of the file in the nightly target; otherwise a part of them."""
    step = 1 if NIGHTLY else 23
    for position in range(0, length, step):
        yield position, position % 8
    yield from ((position, 1) for position in (0, 8, header - 1, header, length - 1))


def test_a_flipped_bit_is_refused_or_harmless(folder: Path) -> None:
    """Anywhere in the weights: an error, or the very tensors and configuration that were saved."""
    saved, whole = read_adapter(folder), (folder / WEIGHTS_NAME).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    harmless = []
    for position, bit in flips(len(whole), header):
        damaged = whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
        (folder / WEIGHTS_NAME).write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, message = read(folder)
        if found is None:
            assert WEIGHTS_NAME in message
            continue
        harmless.append(position)
        assert found.tensors.keys() == saved.tensors.keys()
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in saved.tensors.items())
        assert (found.config.block_size, found.config.bias) == (saved.config.block_size, saved.config.bias)
    assert all(position < header for position in harmless), "every bit of the values counts"


def test_a_flipped_bit_of_the_configuration_is_refused_or_warned_about(folder: Path) -> None:
    whole = (folder / CONFIG_NAME).read_bytes()
    for position in range(0, len(whole), 1 if NIGHTLY else 5):
        (folder / CONFIG_NAME).write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << position % 7]) + whole[position + 1 :]
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found, message = read(folder)
        if found is None:
            assert CONFIG_NAME in message
            continue
        assert found.config.block_size == 6
        # Blanks carry nothing.
        assert told or json.loads((folder / CONFIG_NAME).read_bytes()) == json.loads(whole)


def test_damaged_values_change_nothing(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(folder, CheckpointError, f"{WEIGHTS_NAME} is damaged.*Take a copy that is whole")


@pytest.mark.parametrize("share", [0.0, 0.003, 0.3, 0.9, 0.9999])
def test_a_truncated_file_changes_nothing(folder: Path, share: float) -> None:
    path = folder / WEIGHTS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(folder, CheckpointError, f"{WEIGHTS_NAME}, it may be damaged or incomplete")


def test_swapped_weights_change_nothing(folder: Path, tmp_path: Path) -> None:
    adapted(block_size=3).c3a.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_NAME, folder)
    refused(folder, CheckpointError, rf"{CONFIG_NAME} is not the configuration.*block_size is 6, was 3.*from one save")


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a missing kernel": (lambda t: t.pop(KERNEL), "first"),
    "a foreign kernel": (lambda t: t.update({"base_model.model.third.c3a_kernel": torch.zeros(1, 1, 6)}), "third"),
    "a kernel of another width": (lambda t: t.update({KERNEL: torch.zeros(4, 1, 6)}), r"first.*\[4, 1, 6\]"),
    "a flat kernel": (lambda t: t.update({KERNEL: torch.zeros(48)}), r"first.*\[48\]"),
    "an empty kernel": (lambda t: t.update({KERNEL: torch.zeros(4, 2, 0)}), r"first.*\[4, 2, 0\]"),
    "a kernel of integers": (lambda t: t.update({KERNEL: torch.zeros(4, 2, 6).int()}), "first.*int32"),
    "a kernel of complex numbers": (lambda t: t.update({KERNEL: torch.zeros(4, 2, 6).cfloat()}), "first.*complex64"),
    "a foreign key": (lambda t: t.update({"lm_head.lora_A": torch.zeros(1)}), "keys that no C3A adapter.*lora_A"),
    "a base weight": (lambda t: t.update({"base_model.model.first.weight": torch.zeros(24, 12)}), "first.weight"),
    "a bias of another size": (
        lambda t: t.update({"base_model.model.first.base_layer.bias": torch.zeros(5)}),
        r"first\.(base_layer\.)?bias",
    ),
    "part of a module": (lambda t: t.pop("base_model.model.norm.bias"), "norm.bias"),
    "nothing": (lambda t: t.clear(), "holds no C3A adapter"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_change_nothing(folder: Path, name: str) -> None:
    change, message = TENSORS[name]
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    refused(folder, CheckpointError, message)


FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "another method": ({"peft_type": "LORA"}, f"{CONFIG_NAME}.*'LORA'.*only 'C3A'"),
    "no method": ({"peft_type": None}, f"{CONFIG_NAME}.*None"),
    "a negative size": ({"block_size": -6}, f"{CONFIG_NAME}.*positive integer.*-6"),
    "a fraction": ({"block_size": 6.5}, f"{CONFIG_NAME}.*positive integer.*6.5"),
    "no number": ({"block_size": float("nan")}, f"{CONFIG_NAME}.*positive integer.*nan"),
    "infinity": ({"block_size": float("inf")}, f"{CONFIG_NAME}.*positive integer.*inf"),
    "a bool": ({"block_size": True}, f"{CONFIG_NAME}.*positive integer.*True"),
    "targets of numbers": ({"target_modules": [1]}, f"{CONFIG_NAME}.*non-empty names"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_cannot_be_used_change_nothing(folder: Path, name: str) -> None:
    changes, message = FIELDS[name]
    edit(folder, **changes)
    refused(folder, ConfigError, message)


def test_unknown_fields_are_warned_about(folder: Path) -> None:
    edit(folder, of_a_later_version=1, **{"x" * 10: 2})
    with pytest.warns(UserWarning, match="ignores them: of_a_later_version, xxxxxxxxxx"):
        c3a_triton.load_adapter(MLP(), folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_NAME])
def test_a_pickle_is_never_opened(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / WEIGHTS_NAME).unlink()
    torch.save({KERNEL: torch.zeros(4, 2, 6)}, folder / name)
    model = adapted(seed=1)
    before, opened = described(model), []

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("unpickled")

    def watched(file: object, *arguments: object, real: Callable = builtins.open, **more: object) -> object:
        opened.append(os.fspath(file) if isinstance(file, os.PathLike) else file)
        return real(file, *arguments, **more)

    for module, function in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, function, never)
    monkeypatch.setattr(builtins, "open", watched)
    with pytest.raises(CheckpointError, match=name):
        model.c3a.load_adapter(folder, "new")
    assert not any(str(path).endswith(".bin") for path in opened)
    assert described(model) == before


# What cannot be written


def message_of(call: Callable[[], object]) -> str | None:
    """What a `CheckpointError` of the call says, None where it raises none."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, existing: bool) -> None:
    """Each system call of a save fails in turn: what is there is the former adapter or the new one, no other file."""
    target, former, new = tmp_path / "adapter", adapted(), adapted(seed=2, block_size=3)
    before, failed = described(new), 0
    for name in ("fsync", "replace", "mkdir"):
        real = getattr(os, name)
        for number in range(1, 4):
            shutil.rmtree(target, ignore_errors=True)
            if existing:
                former.c3a.save_pretrained(target)
            calls = []

            def fails(*arguments: object, calls: list = calls, real: Callable = real, number: int = number) -> object:
                calls.append(arguments)
                if len(calls) == number:
                    raise OSError(code, os.strerror(code))
                return real(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fails)
                message = message_of(lambda: new.c3a.save_pretrained(target))
            if message is None:
                # There was no such call, or it was to make a folder that is there already, or the model card.
                no_card = not (target / CARD_NAME).exists()
                assert len(calls) < number or (name == "mkdir" and (existing or number > 1)) or no_card
                continue
            failed += 1
            assert os.strerror(code) in message
            assert str(target) in message
            found = {path.name for path in target.iterdir()} - {CARD_NAME} if target.exists() else set()
            # Once both files have their names, waiting for the folder to reach the disk may fail still.
            in_place = name == "fsync" and number == 3
            assert found == ({CONFIG_NAME, WEIGHTS_NAME} if existing or in_place else set())
            if found:
                wanted = (new if in_place else former).c3a.state_dict()
                tensors = read_adapter(target).tensors
                assert all(torch.equal(tensors[key], value) for key, value in wanted.items())
    assert failed >= 5
    assert described(new) == before


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As mounted object stores: that a file cannot be flushed is an error still."""
    model, flush = adapted(), os.fsync

    def refuses(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or files_too:
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    files_too = False
    model.c3a.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).tensors.keys() == model.c3a.state_dict().keys()
    files_too = True
    with pytest.raises(CheckpointError, match=re.escape(os.strerror(code))):
        model.c3a.save_pretrained(tmp_path)


def in_a_child(work: Callable[[], object], result: Path) -> object:
    """What a call returns in a forked process, whose limits and hooks end with it."""
    pid = os.fork()
    if pid == 0:
        try:
            result.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(result.read_text())


def test_a_disk_that_is_full_in_earnest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may grow to so many bytes and no further, by the system's own limit."""
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path / "cache"))
    model = adapted(block_size=1)
    model.c3a.save_pretrained(tmp_path / "adapter")
    key = Key("card", "9.0", "2.13", "3.9", "bfloat16", 10, 64, 64, 8, "fft")

    def limited(size: int, call: Callable[[], object]) -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            call()
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return "written"

    def work() -> list[str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = partial(model.c3a.save_pretrained, tmp_path / "adapter")
        add = partial(tuned.add, {key._replace(b=b): Times(1.0) for b in range(1, 9)})
        return [limited(100, save), limited(2000, save), limited(100, add)]

    told = in_a_child(work, tmp_path / "told")
    assert [line.partition(":")[0] for line in told] == ["CheckpointError", "CheckpointError", "OSError"], told
    assert all("adapter" in line for line in told[:2])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    read_adapter(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tuned-1.lock"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_merge_on_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    tiny_models = pytest.importorskip("tiny_models")
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model")
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["q_proj"])).c3a.save_pretrained(tmp_path / "a")
    for module, name in ((shutil, "copyfile"), (os, "fsync"), (os, "rename")):

        def fails(*arguments: object, **more: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(CheckpointError, match=f"merged.*{os.strerror(code)}"):
                merge_folder(tmp_path / "model", tmp_path / "a", tmp_path / "merged")
        assert {path.name for path in tmp_path.iterdir()} == {"model", "a"}


# Hostile


MAX_SECONDS = 300.0  # of processor time; none takes more than some, and without a limit most would take days
MAX_BYTES = 1 << 30


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails where the test takes all time, or a gigabyte more memory than there was before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, hard))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < MAX_SECONDS


SLOW = "(a|a|aa)+$"
EXPRESSIONS: dict[str, tuple[dict[str, object], str]] = {
    "a counted group of counted groups": (
        {"block_size_pattern": {"(?:(?:(?:a{1000}){1000}){1000}){1000}": 6}},
        "counted",
    ),
    "a counted target": ({"target_modules": "(?:a|bc){300000}"}, "counted repetitions"),
    "ninety doublings": ({"target_modules": "(?:" * 90 + "a" + "){2}" * 90}, "counted repetitions"),
    "a count of 5000 digits": ({"target_modules": "a{" + "9" * 5000 + "}"}, "counted repetitions|not a valid"),
    "counted with blanks": ({"exclude_modules": "(?x)(?:(?:a|bc) {3000} ) {3000}"}, "counted repetitions"),
    "a megabyte": ({"target_modules": "a" * 2**21}, "more than 1048576 characters"),
    "deep groups": ({"target_modules": "(" * 5000 + ")" * 5000}, "not a valid regular expression"),
    "many keys": ({"block_size_pattern": {f"k{i}": 6 for i in range(100_000)}}, "100001 patterns, more than 4096"),
    "many modules": ({"modules_to_save": [f"k{i}" for i in range(100_000)]}, "more than 65536|more than 4096"),
    "many lists": ({"layers_pattern": [f"k{i}" for i in range(50_000)]}, "50001 patterns, more than 4096"),
    "many targets": ({"target_modules": [f"k{i}" for i in range(100_000)]}, "100000 names, more than 65536"),
    "long text for a number": ({"block_size": "9" * 2**22}, r"positive integer.*\.\.\."),
    "deep values": ({"auto_mapping": [[[[[[[[]]]]]]]] * 1000}, "auto_mapping must be a dict"),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_would_take_all_time_or_memory_is_refused(folder: Path, name: str, bounded: None) -> None:
    changes, message = EXPRESSIONS[name]
    edit(folder, **changes)
    refused(folder, ConfigError, f"{CONFIG_NAME}.*(?:{message})")


def catastrophic() -> nn.Module:
    """A model whose module names bring a bad expression out."""
    model = nn.Module()
    model.add_module("a" * 40 + "b", nn.Linear(12, 24))
    return model


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "block_size_pattern", "modules_to_save", "layers_pattern"]
)
def test_a_catastrophic_expression_ends_in_time(field: str, monkeypatch: pytest.MonkeyPatch, bounded: None) -> None:
    monkeypatch.setattr(expressions, "TIME_LIMIT_S", 0.2)
    expressions.compile_pattern.cache_clear()
    name = "a" * 40 + "b"
    value = {"block_size_pattern": {SLOW: 6}, "modules_to_save": [SLOW], "layers_pattern": [SLOW]}.get(field, SLOW)
    more = {"layers_to_transform": [0], "target_modules": ["0"]} if field == "layers_pattern" else {}
    config = C3AConfig(**({"block_size": 6, "target_modules": [name]} | more | {field: value}))
    model = catastrophic()
    if field == "layers_pattern":
        model = nn.ModuleDict({name: nn.ModuleDict({"0": nn.Linear(12, 24)})})
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"\(a\|a\|aa\)\+\$.* takes too long.*without nested repetitions"):
        c3a_triton.apply(model, config)
    assert [type(module) for module in model.modules()] == classes
    expressions.compile_pattern.cache_clear()


def test_many_expressions_that_are_each_quick_enough(monkeypatch: pytest.MonkeyPatch, bounded: None) -> None:
    monkeypatch.setattr(expressions, "TOTAL_TIME_LIMIT_S", 0.3)
    config = C3AConfig(target_modules=["first"], block_size_pattern={f"(a|a|aa)+{i}": 6 for i in range(1500)})
    with pytest.raises(ConfigError, match=r"take more than 0\.3 s.*write fewer and simpler ones"):
        unmatched_keys(config, [f"{'a' * 14}b{i}" for i in range(100)])


def test_nothing_that_a_file_names_is_followed(folder: Path, tmp_path: Path) -> None:
    """Paths and names in fields are text: no file but the two is opened, and no connection is made."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    edit(
        folder,
        base_model_name_or_path=str(secret),
        revision="../../secret",
        auto_mapping={"base_model_class": "os", "parent_library": "subprocess"},
        task_type=f"file://{secret}",
    )
    model = MLP()

    def work() -> list[tuple[str, str]]:
        seen: list[tuple[str, str]] = []
        watched = ("open", "socket.", "subprocess.", "os.system", "os.exec", "urllib.")

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event.startswith(watched):
                seen.append((event, str(arguments[0]) if arguments else ""))

        sys.addaudithook(watch)
        c3a_triton.load_adapter(model, folder)
        own = (str(folder), str(Path(c3a_triton.__file__).parent))
        return [(event, what) for event, what in seen if not what.startswith(own)]

    told = in_a_child(work, tmp_path / "told")
    assert [entry for entry in told if "secret" in entry[1] or not entry[1].endswith((".py", ".pyc", ".so"))] == []


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "a\0b", "x/y", "\ud800", "a" * 5000, "\n"]
)
def test_shards_lie_in_the_folder(tmp_path: Path, name: str) -> None:
    tiny_models = pytest.importorskip("tiny_models")
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model")
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["q_proj"])).c3a.save_pretrained(tmp_path / "a")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "model" / INDEX_NAME).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="not a file of this folder|cannot read"):
        merge_folder(tmp_path / "model", tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def header(**entry: object) -> bytes:
    text = json.dumps({KERNEL: {"dtype": "F32", **entry}}).encode()
    return len(text).to_bytes(8, "little") + text


HEADERS: dict[str, bytes] = {
    "a length of 10¹⁸": (10**18).to_bytes(8, "little") + b"{}",
    "a length of 2⁶⁴ − 1": b"\xff" * 8 + b"{}",
    "a length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "a length of 0": bytes(8),
    "a tensor of 4 PiB": header(shape=[2**24, 2**24, 4], data_offsets=[0, 2**52]),
    "sizes that overflow": header(shape=[2**63, 2], data_offsets=[0, 0]),
    "deep JSON": (10**6).to_bytes(8, "little") + b'{"a":' + b"[" * 10**6,
    "no JSON": (8).to_bytes(8, "little") + b"\x00" * 64,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(folder: Path, name: str, bounded: None) -> None:
    (folder / WEIGHTS_NAME).write_bytes(HEADERS[name])
    refused(folder, CheckpointError, f"{WEIGHTS_NAME}, it may be damaged")


def test_a_header_of_many_names(folder: Path, bounded: None) -> None:
    """Many kernels for layers that the model has not: named, not compared one by one with all that it has."""
    tensors = {f"base_model.model.layer{i}.c3a_kernel": torch.zeros(1, 1, 1) for i in range(5000)}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    refused(folder, CheckpointError, "no layer|has no first")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10**6, "not valid JSON"),
        (b'{"a":' * 10**5, "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "must hold a JSON object, found list"),
        (b'{"block_size":' + b"9" * 10**6 + b"}", "not valid JSON"),
        (b" " * (17 * 2**20), "larger than 16777216 bytes"),
    ],
    ids=["deep lists", "deep objects", "empty", "no text", "a list", "a number of a million digits", "17 MiB"],
)
def test_configurations_that_are_no_json(folder: Path, content: bytes, message: str, bounded: None) -> None:
    (folder / CONFIG_NAME).write_bytes(content)
    refused(folder, CheckpointError, f"{CONFIG_NAME}.*{message}")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pipe_does_not_block(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, CheckpointError, f"{name}.*not a regular file")


# Mutations


def test_readers_take_mutations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make nightly` does for ten minutes under atheris, for a moment and without it."""
    monkeypatch.chdir(tmp_path)
    fuzz.import_readers()
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path))
    for seed in fuzz.seeds():
        fuzz.READERS[seed[0]](seed[1:], tmp_path)  # good files are read
    assert fuzz.fuzz_randomly(3, seed=1) > 100


def test_a_time_that_no_float_holds_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C3A_TRITON_CACHE", str(tmp_path))
    key = Key("card", "9.0", "2.13", "3.9", "bfloat16", 10, 64, 64, 8, "fft")
    tuned.add({key: Times(1.0)})
    tuned.path().write_text(tuned.path().read_text().replace("1.0", "1" + "0" * 400))
    with pytest.warns(UserWarning, match="set aside"):
        assert tuned.load() == ({}, {})


def test_notes_that_are_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_CONFIG_BYTES", 100)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}: the notes .* larger"):
        read_adapter(folder)


def test_the_digest_covers_names_and_notes(folder: Path) -> None:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(tensors, folder / WEIGHTS_NAME, metadata)
    read_adapter(folder)  # written anew by another program, with nothing changed
    second = KERNEL.replace("first", "second")
    for damaged, notes in (
        ({**tensors, KERNEL: tensors[KERNEL].view(8, 1, 6)}, metadata),
        ({**tensors, second: tensors[second].view(torch.int32)}, metadata),
        ({**{k: v for k, v in tensors.items() if k != KERNEL}, KERNEL + "s": tensors[KERNEL]}, metadata),
        (
            tensors,
            metadata | {"c3a_triton_config": metadata["c3a_triton_config"].replace("gaussian", "kaiming_uniform")},
        ),
    ):
        save_file(damaged, folder / WEIGHTS_NAME, notes)
        refused(folder, CheckpointError, f"{WEIGHTS_NAME} is damaged")
