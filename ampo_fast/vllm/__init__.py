"""Rollouts with vLLM, in this process or from servers, behind the protocol of ampo_fast.rollouts. What is in here:

    engine     rollout.engine = "vllm": vLLM inside this process
    server     rollout.engine = "vllm-server": several servers, and what happens when one fails
    replica    one of those servers, as its HTTP interface shows it
    process    one server that we started: its command, its life, its last words
    lifeline   ends a server with whoever started it
    transfer   weights from GPU to GPU through vLLM's own API
    weight_files  weights as files, gone with whoever wrote them
    requests   what both engines ask for, and what counts as an answer
    canary     whether an engine samples from the weights that are trained

`import vllm` means the real vLLM, here too: no module of this directory may be run as a script by its path.
"""
