#!/usr/bin/env python3
"""Writes a made-up checkpoint in the released format: right layout, random numbers.

python scripts/make_checkpoint.py FOLDER --demo              about 100 MB, all kinds of layers
python scripts/make_checkpoint.py FOLDER --preset tiny       one of the presets of dsv4_jax.config
python scripts/make_checkpoint.py FOLDER --config my.json    any config.json
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from dsv4_jax.chat.made_up import write_tokenizer
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import FLASH, PRESETS, Config
from dsv4_jax.errors import DSV4Error
from dsv4_jax.weight_files import read_json_object

DEMO = dataclasses.replace(
    FLASH,
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=6,
    num_hash_layers=2,
    compress_ratios=(0, 0, 4, 128, 4, 128, 0),
    num_attention_heads=8,
    o_groups=2,
    o_lora_rank=256,
    q_lora_rank=256,
    index_n_heads=16,
    index_topk=64,
    n_routed_experts=24,
    moe_intermediate_size=512,
    max_position_embeddings=16384,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", action="store_true")
    what.add_argument("--preset", choices=list(PRESETS))
    what.add_argument("--config", type=Path)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        if arguments.config:
            raw = read_json_object(arguments.config, 10_000_000, DSV4Error)
            config = Config.from_dict(raw, str(arguments.config))
        else:
            config = DEMO if arguments.demo else PRESETS[arguments.preset]
        write_checkpoint(arguments.folder, config, shards=arguments.shards, seed=arguments.seed)
        write_tokenizer(arguments.folder, config.vocab_size)
    except DSV4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
