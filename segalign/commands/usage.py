"""What ``python main.py --help`` prints."""

USAGE = """usage: python main.py COMMAND [options]     (help on one: python main.py COMMAND --help)

train and evaluate; configs are layered left to right, `--key.subkey VALUE` overrides them:
  fit       --config FILE [--config FILE ...] [--ckpt_path auto|RUN|CHECKPOINT] [--run_dir DIR]
            [--strict]
  validate  --config FILE --ckpt_path auto|best|RUN|CHECKPOINT
  test      --config FILE --ckpt_path auto|best|RUN|CHECKPOINT
  predict   --config FILE --ckpt_path auto|best|RUN|CHECKPOINT

images and weights:
  generate  --checkpoint RUN|CHECKPOINT|FOLDER --prompt TEXT|--prompt-file FILE --out DIR
  export    --checkpoint RUN --format diffusers|lora|official-lora --out DIR
  import    official LoRA lists, adapters, Denscore, LongSD

studies:
  sweep     plan | run | status | resume | retry | cancel | table | plot | report STUDY

results:
  results   FILE [FILE ...]: results of `test` as one table, if their numbers may be compared
  direction estimate a scorer's common direction, or report what it does to scores

data:
  shards    pack, split, index, verify or encode WebDataset shards
  stats     compute statistics of real images, which FID and its kin compare with
  scenes    keep the weights of the tiny base of the embedded benchmark

SEGALIGN_DEBUG=1 in the environment shows the traceback of every error.
"""
