"""What stock transformers makes of a folder; run by shipped.py in an interpreter of its own.

    PYTHON -I logits_bare.py FOLDER REQUEST.json LOGITS.npy

Imports nothing of this project, and prints which modules of that name were loaded all the same.
Needs torch, transformers and safetensors. REQUEST: {"tokens": [ids], "text": what to tokenise}.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

OURS = {"modeling", "registry", "runtime", "stages", "flows", "apps"}


def main() -> None:
    """Write the logits (T, V), and print what else was found as JSON."""
    folder, request, answer = sys.argv[1:4]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    local = {"local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **local)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([asked["tokens"]])).logits[0]
    np.save(answer, logits.float().numpy())
    found = {
        "tokens": tokenizer.encode(asked["text"]),
        "ours": sorted(OURS & {name.split(".")[0] for name in sys.modules}),
        "with": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
