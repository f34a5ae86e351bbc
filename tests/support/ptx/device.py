"""The Triton backend on a pretended GPU: its operators, executed from PTX by a process that has Triton's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steam_kernels.ops import Operators, from_arguments, with_any_strides
from steam_kernels.schemas import Backward, Forward
from tests.support.ptx import triton
from tests.support.ptx.executor import Fault, Findings
from tests.support.ptx.triton import Answer, Call, Edit

ROOT = Path(__file__).resolve().parents[3]


def detached(given: Any) -> Any:
    """The arguments of an operator with no history of autograd, which another process cannot have."""
    if isinstance(given, Tensor):
        return given.detach()
    return type(given)(*map(detached, given)) if hasattr(given, "_fields") else given


@dataclass
class Device:
    """Calls of the operators go to a process of its own. How they are run is set here."""

    target: str = "sm_80"
    whole: bool = True
    seed: int = 0
    first_wins: bool = False
    edit: Edit | None = None
    found: Findings = field(default_factory=Findings)  # by all calls; a test may put a new one in its place
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log: Any = field(default=None, repr=False)

    def reset(self) -> None:
        """As made, with the process that there is."""
        fresh = Device()
        for name in ("target", "whole", "seed", "first_wins", "edit", "found"):
            setattr(self, name, getattr(fresh, name))

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._log.close()
            self._process = None

    def operators(self) -> Operators:
        return from_arguments(with_any_strides(Operators(self._forward, self._backward, self._forward_)))

    def _forward(self, given: Forward) -> tuple[Tensor, Tensor]:
        y, saved = self._call("forward", given).results
        return y, saved

    def _backward(self, given: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dchannel, dspatial, dresidual = self._call("backward", given).results
        return dx, dchannel, dspatial, dresidual

    def _forward_(self, given: Forward) -> None:
        answer = self._call("forward_", given)
        assert answer.x is not None
        given.inputs.x.copy_(answer.x)

    def _call(self, operator: str, given: Forward | Backward) -> Answer:
        call = Call(operator, detached(given), self.target, self.whole, self.seed, self.first_wins, self.edit)
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            triton.send(process.stdin, call)
            answer: Answer = triton.receive(process.stdout)
        except (BrokenPipeError, EOFError):
            process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")
            self._process = None
            raise RuntimeError(f"the executor's process exited with {process.returncode}: {said[-4000:]}") from None
        self.found.launches += answer.launches
        self.found.unstored += answer.unstored
        if answer.error:
            raise Fault(answer.error) if answer.is_fault else RuntimeError(answer.error)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ptx.triton"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        return self._process
