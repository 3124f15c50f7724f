"""Write a model with more layers that says the same: the layers more add nothing.

    python tools/deepen_model.py --layers 40 --out deep
    sagellm bench speculation --model deep --draft-model builtin

So the built-in model is a draft model that is always right, for one that takes as long as a larger one: what
speculation gains at most, and what its own work costs.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sagellm.models.hub import resolve

SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Of a layer, what adds to the stream."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="folder of the model to begin with")
    parser.add_argument("--layers", type=int, required=True, help="layers of the new one")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    given = parser.parse_args()
    shutil.copytree(resolve(given.model), given.out)
    weights = load_file(given.out / "model.safetensors")
    config = json.loads((given.out / "config.json").read_text())
    for layer in range(config["num_hidden_layers"], given.layers):
        for name in [name for name in weights if name.startswith("model.layers.0.")]:
            part = name.removeprefix("model.layers.0.")
            value = weights[name]
            weights[f"model.layers.{layer}.{part}"] = (
                torch.zeros_like(value) if part in SILENT else value.clone()
            )
    config["num_hidden_layers"] = given.layers
    (given.out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, given.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
