"""The checkpoint's tokenizer, from its own folder alone."""

from __future__ import annotations

from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.files import check_files


def load_tokenizer(model_path: str, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    check_files(model_path, "Tokenizer file", "fetch the checkpoint again")
    try:
        return AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged tokenizer file fails in many ways, all of them the checkpoint's
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{model_path} has no usable tokenizer ({reason}); fetch the checkpoint again.") from None
