"""What every rank is told: the plan, where the model and the files are, and how requests are read.

The launcher carries it on the command line. Over several hosts that line passes a shell, so a job travels as one
token of letters, digits, `-`, `_` and `=`; nothing a configuration holds is ever read by a shell.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass

from ds_llmpq.errors import UserError
from ds_llmpq.planner.plan import Plan
from ds_llmpq.schema import BatchConfig, EngineConfig

_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """Paths are absolute. `input` and `output` lie on the first host, `model_path` on every host."""

    plan: Plan
    model_path: str
    input: str
    output: str
    engine: EngineConfig
    batch: BatchConfig
    trust_remote_code: bool = False
    # progress as lines for a parent process instead of a bar
    supervised: bool = False

    def to_token(self) -> str:
        fields = {name: getattr(self, name) for name in ("model_path", "input", "output", "supervised")}
        fields |= {"trust_remote_code": self.trust_remote_code, "plan": self.plan.to_json()}
        fields |= {"engine": asdict(self.engine), "batch": asdict(self.batch)}
        return base64.urlsafe_b64encode(zlib.compress(json.dumps(fields).encode(), 9)).decode()

    @classmethod
    def from_token(cls, token: str) -> Job:
        try:
            data = zlib.decompressobj().decompress(base64.urlsafe_b64decode(token), _MOST_BYTES)
            fields = json.loads(data)
            return cls(
                **fields
                | {
                    "plan": Plan.from_json(fields["plan"]),
                    "engine": EngineConfig(**fields["engine"]),
                    "batch": BatchConfig(**fields["batch"]),
                }
            )
        except (binascii.Error, zlib.error, ValueError, TypeError, KeyError) as error:
            raise UserError(f"The job token cannot be read ({error}); start serve through `ds-llmpq run`.") from None
