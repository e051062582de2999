"""More than 10,000 damaged inputs for the four loaders: each is read or refused in a line, and nothing else happens."""

import copy
import json
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save

import vitopt
from vitopt import model as models, store
from vitopt.architecture import RESERVED
from vitopt.errors import InputError
from vitopt.recipe import read

COUNTS = {"recipe": 4000, "model.json": 2000, "weights": 2000, "store": 3000}
SECONDS, MEMORY = 10, 2 ** 28  # that one input may take, and that all of a loader's may take together

DEEP = ["@deep list@", "@deep dictionary@"]  # json and yaml would not write these, so they are put into the text
VALUES = [
    0, -1, 1, 2, 3, 7, 8, 255, 10 ** 4, 2 ** 31, 2 ** 63, 10 ** 12, -10 ** 12, 10 ** 30, 0.5, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), True, False, None, "", " ", "a", "a" * 3000, "\0", "\n", "\ud800", "é🙈\u202e",
    "'\"{}[]%s", "../../etc/passwd", "/etc/passwd", "hf-hub:timm/resnet18", "local-dir:/tmp", "resnet18", "__class__",
    "blocks.0", "blocks.__class__", "head", "l1", "taylor", "1e3", "0x10", "2020-01-01",
    "!!python/name:os.system", "*a", "&a", "<<", [], {}, [[]], [0], [1] * 500, ["blocks.0"], {"": ""},
    {"a": {"b": [1, {}]}}, {"x" * 300: 1}, *DEEP]
KEYS = [*sorted(RESERVED), "depth", "embed_dim", "window_size", "norm_layer", "act_layer", "block_fn", "class_token",
        "removed_blocks", "classes", "widths", "kwargs", "name", "target", "axes", "teacher", "layers", "steps", "",
        "\n", "🙈", "__class__", "a.b", "0"]
PIECES = [
    b"&a ", b"*a", b"*a, *a", b"!!python/object/apply:os.system [id]", b"!!binary ", b"!!set ", b"!!omap ", b"!!int ",
    b"!!timestamp ", b"!!float ", b"!!bool ", b"<<: ", b"? ", b"- ", b": ", b"[", b"]", b"{", b"}", b"\t", b"\n", b"\0",
    b"%YAML 9", b"---", b"...", b"|", b">", b"1:1:1", b"9" * 200, b"0x", b"1e999", b"NaN", b"-Infinity", b"\xff\xfe",
    b"\xed\xa0\x80", b"\\ud800", b'"', b"'", b"2001-99-99", b"null", b"[" * 99, b'{"a":' * 99, b"- " * 99, b"? " * 99]
BOMB = b"".join(b"k%d: &k%d [%s]\n" % (n, n, b", ".join([b"*k%d" % (n - 1) if n else b"1"] * 9)) for n in range(20))


def nodes(tree, place=()):
    """Every place in a tree of lists and dictionaries, as keys."""
    yield place
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from nodes(value, (*place, key))


def mutated(chance: random.Random, tree):
    """A copy with one to three places changed: other values and types, keys and values gone, doubled and swapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.randint(1, 3)):
        places = [place for place in nodes(tree) if place]
        if not places:
            return tree
        *path, key = chance.choice(places)
        owner = tree
        for step in path:
            owner = owner[step]
        kind = chance.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1:  # under another name, or once more
            if isinstance(owner, dict):
                owner[chance.choice(KEYS)] = copy.deepcopy(owner[key])
            else:
                owner.append(copy.deepcopy(owner[key]))
        elif kind == 2:
            owner[key] = [owner[key]]
        elif kind == 3 and isinstance(owner[key], (int, float)):
            owner[key] = owner[key] * chance.choice([-1, 2, 3, 0.5, 10 ** 6, 10 ** 12]) + chance.choice([0, 1, -1])
        elif kind == 4 and isinstance(owner[key], dict):
            owner[key][chance.choice(KEYS)] = copy.deepcopy(chance.choice(VALUES))
        else:
            owner[key] = copy.deepcopy(chance.choice(VALUES))
        if not isinstance(tree, (dict, list)):
            return tree
    return tree


def damaged(chance: random.Random, content: bytes) -> bytes:
    """With bits flipped, cut, pieces put in, gone, doubled or swapped."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        end = min(end, start + 200)
        kind = chance.randrange(6)
        if kind == 0 and content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[start:None if chance.random() < 0.3 else end]
        elif kind == 2:
            content[start:start] = chance.choice(PIECES)
        elif kind == 3:
            content[start:end] = content[start:end] * 2
        elif kind == 4:
            content[start:end] = chance.choice(PIECES)
        else:
            content[start:start] = chance.randbytes(chance.randint(1, 9))
    return bytes(content)


def deepened(text: str, depth: int) -> bytes:
    lists, dictionaries = "[" * depth + "]" * depth, '{"a": ' * depth + "1" + "}" * depth
    for quote in "\"'":
        text = text.replace(f"{quote}{DEEP[0]}{quote}", lists).replace(f"{quote}{DEEP[1]}{quote}", dictionaries)
    return text.encode("utf-8", "surrogatepass")


class Hang(BaseException):
    """No loader may take it for an error of what it reads."""


WATCHED = {}  # the folder that may be written, and what else happened; an audit hook cannot be taken away again
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "shutil.")
RUNNING = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "socket.", "pickle.",
           "urllib.", "ctypes.dlopen")


def watch(event, args):
    if "folder" not in WATCHED:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = Path(args[0].decode() if isinstance(args[0], bytes) else args[0])
        code = path.suffix in (".py", ".pyc", ".so") or path.is_relative_to(sys.prefix)
        if not path.is_relative_to(WATCHED["folder"]) and not (code and args[1] in ("r", "rb", None)):
            WATCHED["seen"].append((event, args))
    elif event == "exec":
        place = args[0].co_filename
        if not place.startswith(("<timm.", "<frozen", "<attrs", "<string>", sys.prefix, sys.base_prefix)):
            WATCHED["seen"].append((event, place))
    elif event.startswith(RUNNING + WRITING):
        WATCHED["seen"].append((event, args))


sys.addaudithook(watch)


@pytest.fixture
def guarded(tmp_path):
    """Runs a loader on one input after another: each must end soon, with a result or with an error of one line."""
    folder = tmp_path / "run"
    folder.mkdir()

    def hang(number, frame):
        raise Hang

    def attempt(load, case) -> str:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            load(case)
        except InputError as error:
            wrong = [problem for problem in error.problems if not is_line(problem)]
            return f"no line: {wrong[0]!r}" if wrong or not error.problems else "refused"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return "read"

    def run(load, cases, warm):
        outcomes, failures = Counter(), {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(warm)  # what is imported once is not the input's
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            WATCHED.update(folder=folder, seen=[])
            for case in cases:
                outcome = attempt(load, case)
                if WATCHED["seen"]:
                    outcome = f"it did {WATCHED['seen']}"
                    WATCHED["seen"] = []
                outcomes[outcome] += 1
                if outcome not in ("read", "refused"):
                    failures[outcome[:60]] = f"{outcome[:300]} from {str(case)[:2000]}"
        memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert not failures, "\n".join([f"{len(failures)} kinds of failures", *list(failures.values())[:8]])
        assert memory < MEMORY
        assert min(outcomes["read"], outcomes["refused"]) > 50, outcomes  # neither is the rule
        return outcomes.total()

    former = signal.signal(signal.SIGALRM, hang)
    yield SimpleNamespace(run=run, folder=folder)
    WATCHED.clear()
    signal.signal(signal.SIGALRM, former)


def is_line(problem: str) -> bool:
    return 0 < len(problem) < 2000 and len(problem.splitlines()) == 1


RECIPE = {
    "model": {"name": "vit_base_patch16_224", "img_size": 16, "depth": 2}, "data": {"name": "digits", "limit": 100},
    "prune": {"ratio": {"heads": 0.5, "blocks.0.*": 0.1}, "importance": "l2", "align": 1},
    "distill": {"teacher": ["baseline", {"name": "resnet18", "pretrained": True}],
                "logits": {"loss": "kl", "temperature": 4.0}, "features": {"layers": {"blocks.0": "blocks.1"}}},
    "train": {"epochs": 3, "batch_size": 32, "lr": 1e-3, "augment": {"crop": "pad", "hflip": 0.5}}, "seed": [0, 1]}


def test_a_recipe_is_read_or_refused_in_a_line_a_mistake(guarded):
    chance, path = random.Random(0), guarded.folder / "row.yaml"
    text, depths = yaml.safe_dump(RECIPE).encode(), [5, 50, 5000]
    anchored = text.replace(b"model:", b"model: &a", 1).replace(b"data:", b"data: &b", 1)

    def cases():
        for number in range(COUNTS["recipe"]):
            kind = number % 4
            if kind == 0:
                yield deepened(yaml.safe_dump(mutated(chance, RECIPE), allow_unicode=True), chance.choice(depths))
            elif kind == 1:
                yield damaged(chance, anchored)
            elif kind == 2:
                yield damaged(chance, BOMB + text if chance.random() < 0.1 else text)
            else:
                yield deepened(json.dumps(mutated(chance, RECIPE)), chance.choice(depths))

    def load(content):
        path.write_bytes(content)
        recipes, problems = read([str(path)], ["train.lr=*a"] if content[:1] == b"k" else [])
        assert bool(recipes) != bool(problems)
        if problems:
            raise InputError(*problems)
        recipes[path].model_dump(mode="json")

    assert guarded.run(load, cases(), text) == COUNTS["recipe"]


@pytest.fixture
def smallest(guarded, tiny):
    """Folders of a plain and of a pruned model of one block, and their model.json and weights."""
    found = []
    for cut in (False, True):
        model = tiny(num_classes=3, depth=1 + cut, embed_dim=8, num_heads=2)
        if cut:
            vitopt.prune(model, {"hidden": 0.3, "heads": 0.5, "depth": 0.5}, align=1)
        models.save(model, guarded.folder)
        found.append([(guarded.folder / name).read_bytes() for name in ("model.json", "model.safetensors")])
    return found


def test_a_model_json_is_loaded_or_refused_in_a_line(guarded, smallest):
    chance = random.Random(1)

    def cases():
        for number in range(COUNTS["model.json"]):
            described, weights = smallest[number % 2]
            if number % 4 < 3:
                changed = json.dumps(mutated(chance, json.loads(described)))
                described = deepened(changed, chance.choice([5, 900, 10 ** 5]))
            else:
                described = damaged(chance, described)
            yield described, weights

    assert guarded.run(lambda case: load_run(guarded.folder, *case), cases(), smallest[1]) == COUNTS["model.json"]


def load_run(folder, described: bytes, weights: bytes):
    (folder / "model.json").write_bytes(described)
    (folder / "model.safetensors").write_bytes(weights)
    vitopt.load(folder)


def with_header(header, data: bytes) -> bytes:
    text = deepened(json.dumps(header), 3000)
    return len(text).to_bytes(8, "little") + text + data


def apart(content: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def harmed(chance: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, other data, or other bytes at its beginning."""
    header, data = apart(content)
    kind = chance.randrange(5)
    if kind == 0:
        return damaged(chance, content)
    if kind == 1:
        return chance.randbytes(8) + content[8:]
    if kind == 2:
        return with_header(header, damaged(chance, data))
    if kind == 3:  # another shape or dtype of as many bytes
        name = chance.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        kind = chance.randrange(4)
        entry["shape"] = [entry["shape"][::-1], [1, *entry["shape"]], entry["shape"], entry["shape"] + [1]][kind]
        entry["dtype"] = chance.choice([entry["dtype"], "I32", "U32", "F8_E4M3", "C64", "F4", "BOOL"])
        return with_header(header, data)
    return with_header(mutated(chance, header), data)


def test_a_file_of_weights_is_loaded_or_refused_in_a_line(guarded, smallest):
    chance = random.Random(2)
    cases = ((described, harmed(chance, weights))
             for number in range(COUNTS["weights"]) for described, weights in [smallest[number % 2]])
    assert guarded.run(lambda case: load_run(guarded.folder, *case), cases, smallest[0]) == COUNTS["weights"]


@pytest.mark.parametrize("classes", [3, 120])
def test_stored_logits_are_read_or_said_to_be_damaged(guarded, classes):
    chance, said, steps, rows = random.Random(classes), [], 3, 4
    torch.manual_seed(0)
    kept = [store._condensed(torch.randn(rows, classes)) for _ in range(steps)]
    kept = {name: torch.stack([step[name] for step in kept]) for name in kept[0]}
    known = store.Store.__new__(store.Store)
    known.path, known.classes = guarded.folder / "epoch.safetensors", classes
    known.steps, known.batch_size = steps, rows
    known.accelerator = SimpleNamespace(print=said.append)

    def signed(tensors):
        return save(tensors, {"sha256": store._checksum(tensors)})

    def changed():
        """Other tensors under a right checksum."""
        tensors = dict(kept)
        name = chance.choice(list(tensors))
        tensor = tensors[name].clone()
        kind = chance.randrange(5)
        if kind == 0:
            del tensors[name]
            return tensors
        if kind == 1:
            tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice([0, -1, 1, 119, 120, 10 ** 4])
        elif kind == 2:
            tensor = tensor.to(chance.choice([torch.float32, torch.int64, torch.int8, torch.bool]))
        elif kind == 3:
            tensor = tensor[:, :2].contiguous() if chance.random() < 0.5 else tensor.flatten()
        else:
            name = chance.choice([*kept, "more"])
        tensors[name] = tensor
        return tensors

    def load(content):
        known.path.write_bytes(content)
        known.stored, known.step = known._load(), 0
        if known.stored is None:
            raise InputError(said.pop())
        for known.step in range(steps):
            assert known.read(torch.arange(rows)).shape == (rows, classes)

    count = COUNTS["store"] // 2
    cases = (signed(changed()) if number % 2 else harmed(chance, signed(kept)) for number in range(count))
    assert guarded.run(load, cases, signed(kept)) == count


@pytest.mark.parametrize("deed", [
    lambda folder: (folder.parent / "elsewhere").write_text(""), lambda folder: open("/etc/passwd").close(),
    lambda folder: (folder / "model.json").rename(folder.parent / "elsewhere"),
    lambda folder: pickle.loads(pickle.dumps(Path())), lambda folder: subprocess.run(["true"]),
    lambda folder: socket.socket().close(), lambda folder: exec(compile("1", "<elsewhere>", "exec")),
    lambda folder: 1 / 0, lambda folder: time.sleep(5),
])
def test_a_loader_that_did_more_than_loading_would_be_seen(guarded, monkeypatch, deed):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.5)
    (guarded.folder / "model.json").touch()
    with pytest.raises(AssertionError, match="1 kinds of failures"):
        guarded.run(lambda case: case(guarded.folder), [deed], lambda folder: None)


def test_these_are_ten_thousand_inputs():
    assert sum(COUNTS.values()) >= 10_000
