"""A peer's adapter asks its library for what our operation is, as far as that can be seen without a GPU."""

import ast
from pathlib import Path

import pytest

from automodel_accel.kernels.facts import this_machine
from bench import worker
from bench.case import UnsupportedError
from bench.cases import cases
from bench.operations import OPERATIONS
from bench.peers import PEERS, Peer

LIGER = sorted(PEERS["liger"].operations)
SIZES = {"tokens": 8, "hidden": 64, "intermediate": 64, "vocab": 128, "heads": 4, "key_heads": 2}


@pytest.mark.parametrize("name", LIGER)
def test_liger_computes_what_eager_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    if not this_machine().triton_interpreter:
        pytest.skip("the bench itself compares them on a GPU")
    from tests.budgets.liger import runnable

    monkeypatch.setattr(worker, "TRIED", SIZES)
    with runnable():
        for case in cases(OPERATIONS[name], "cpu", "float32", models=OPERATIONS[name].models, quick=True):
            if case.options.get("softcap"):
                continue  # its kernel calls a function of libdevice, which the interpreter lacks
            if case.options.get("activation") == "gelu_tanh" and name == "activation":
                with pytest.raises(UnsupportedError, match="has no kernel of gelu_tanh without a gate"):
                    worker.error(PEERS["liger"].forward(name), case, "cpu")
                continue
            assert worker.error(PEERS["liger"].forward(name), case, "cpu") < 1e-5


def test_a_library_is_imported_by_its_own_peer_alone() -> None:
    folder = Path(worker.__file__).parent
    libraries = {"liger_kernel", "cut_cross_entropy", "quack", "transformer_engine", "unsloth", "flash_attn", "torchao"}
    for path in folder.glob("*.py"):
        names = {name.split(".")[0] for name in _imported(path)}
        assert not names & libraries, path.name
    for peer in PEERS.values():
        names = {name.split(".")[0] for name in _imported(folder / "peers" / f"{peer.module}.py")}
        assert len(names & libraries) <= 1


def _imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_an_adapter_has_the_operations_that_its_peer_claims(peer: Peer) -> None:

    path = Path(worker.__file__).parent / "peers" / f"{peer.module}.py"
    named = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert peer.operations <= named
    assert peer.operations <= OPERATIONS.keys()
