"""Rollouts: prompts in, groups of candidates out, each with its own log-probs and policy version. What is in here:

    protocol     what an engine is, and what those share that need the policy alone
    engines      which one a config names
    given        the responses that came with the data
    decoding     sampling in this process, with keys and values of its own
    few_rows     the linear layers of a decoding step on a CPU
    held_casts   frozen linear layers under autocast, cast once a batch
    sampling     from logits to tokens
    main_engine  rank 0's engine, as every rank sees it
    segments     SAPO's pairs: a given answer, and the same with a segment written anew
    batches      which prompts are answered together, and by which rank
    rounds       a round's groups: sampled, scored, selected, written down
    lookahead    the next round, made while this one is trained on
    replay       the buffer that a round's groups join and are drawn from

The engines of vLLM are in ampo_fast.vllm.
"""
