"""The bridge to LlamaFactory: the only room that imports it.

Relied on, all of LlamaFactory 0.9.5:

- `hparams`: the five argument classes and `get_train_args`;
- `train.tuner`: `run_exp(args: dict)`, `get_train_args` and `LogCallback._write_log`;
- `model.adapter`: what it raises is about the keys of a `finetuning_type`, not the model's folder;
- `train.<stage>.workflow`: `load_tokenizer`, `load_model` and `get_template_and_fix_tokenizer` of
  every stage, `get_dataset` and `CustomSeq2SeqTrainer` or `CustomTrainer` of sft and pt;
- `data.loader`: `get_dataset_list`, `load_dataset`, `align_dataset` and `_get_dataset_processor`,
  to carry a row's origin through preprocessing; `_get_merged_dataset`, to put rows in order;
  `_load_single_dataset`, to name the data set that cannot be loaded;
- `extras.logging`: the library's logger and its level, and that `data.loader` and a processor's
  `print_data_example` print an example of each data set;
- outside of training, `data.get_dataset`, `data.SFTDataCollatorWith4DAttentionMask` and `model`'s
  two loaders; `extras.misc.get_device_count`; `cli.main`.

Names are swapped by a context manager (`arguments.swapped`) for one run, and put back.
"""
