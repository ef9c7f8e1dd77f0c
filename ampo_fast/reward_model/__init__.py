"""Reward models: groups of scored responses in, a HuggingFace sequence classifier out, and how well it predicts.

    config               what `ampo-fast train-reward` can be told
    training             the trainer
    checkpoint           where its run stands, to go on from
    data                 pairs and groups: what is scored, left out, held out
    model                the reward model: groups in, one score a response out; its export
    text                 what it reads: prompt and response through the chat template
    classifier_settings  what a backbone's checkpoint must say of itself
    mean_pooling         a BERT-like encoder that pools the mean over its tokens
    frozen_blocks        the output of blocks that are not trained, kept instead of computed
    evaluation           scores against preferences, by margin and by length
    calibration          its measures, as functions of numbers

Their losses are in ampo_fast.losses.reward_model, their report is ampo_fast.report.reward_page. The package imports nothing:
the command line reads the config without torch.
"""
