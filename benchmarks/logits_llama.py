"""What llama.cpp makes of a GGUF file; run by shipped.py in an interpreter that has its binding.

    PYTHON -I logits_llama.py FILE.gguf REQUEST.json LOGITS.npy

Needs llama-cpp-python (pip install llama-cpp-python: a C++ build of some minutes). Keys and values
are kept in float32, where llama.cpp takes float16 unless told: the file is compared, not the cache.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    """Write the logits (T, V), and print what else was found as JSON."""
    file, request, answer = sys.argv[1:4]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    count = len(asked["tokens"])
    model = llama_cpp.Llama(
        file, n_ctx=count, n_batch=count, n_ubatch=count, n_threads=1, n_threads_batch=1,
        logits_all=True, verbose=False, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    model.eval(asked["tokens"])
    np.save(answer, np.array(model.scores[:count], dtype=np.float32))
    found = {
        "tokens": model.tokenize(asked["text"].encode(), add_bos=True, special=True),
        "with": f"llama-cpp-python {llama_cpp.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
