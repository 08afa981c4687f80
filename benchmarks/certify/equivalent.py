"""Mutants that change no number of any training, each with the argument for it; names as in the page of results."""

ARGUMENTS: dict[str, str] = {
    "boundary (True): step 2": (
        "hop 2 in a micro-step before the boundary only sends more: the sums are those of the same terms. The "
        "boundary also broadcasts buffers, which the evaluation after this very micro-step makes equal anyhow"
    ),
    "buffers equal (_end_window): step 2": (
        "windows 1 and 3 begin a comparison, the second one only counts; what differs is known from the first"
    ),
    "lightning_mics/_torch/fsdp.py:229 drop_unreduced_gradients: loop without its first turn [559]": (
        "called where a window is abandoned; at the end of a fit and before its first micro-step nothing is pending"
    ),
    "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py:493 foreach_all_gather_copy_out: "
    "loop without its first turn [856]": (
        "of the parameters that are sharded along another dim than the first: there are none, as the package "
        "shards rows"
    ),
    "lightning_mics/techniques/pending_gradients.py:73 PendingGradients.accumulate: other operator [78]": (
        "the first sum of a window is copied into new memory in place of what is there: the same values"
    ),
    "lightning_mics/techniques/once_per_step.py:191 NodeCache.__call__: truth flipped [439]": (
        "`async_op` of the stage inside the node: gloo's work is waited for by FSDP2 before the copy-out, as "
        "its handle is returned"
    ),
    "lightning_mics/integrations/trainer/checkpoints.py:150 SavesAndLoads._complete: other operator [314]": (
        "a checkpoint of a fit has states of optimizers, and the Trainer has a function: both conditions are false"
    ),
    "lightning_mics/integrations/trainer/checkpoints.py:285 keep_hyperparameters: loop without its first turn [897]": (
        "of the hyper-parameters that the module has saved: it saves none"
    ),
    "lightning_mics/sharding/initialization.py:121 _own_tensors: truth flipped [423]": (
        "no module has a parameter or buffer under two names of its own; ties are between modules, which are "
        "visited one by one"
    ),
    "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py:373 FSDPParamGroup.unshard: condition negated [672]": (
        "nothing is gathered ahead, and blocks compute with sharded parameters, which the package serves as "
        "direct use: the numbers are right, and only the traffic is another"
    ),
    "lightning_mics/sharding/schedule.py:156 AccumulationSchedule._register_hooks: loop without its first turn [117]": (
        "of the root's hook, which includes its unused parameters as zeros: the root uses all of its own each time"
    ),
    "lightning_mics/sharding/modules/broadcast_buffers.py:97 BufferBroadcast._after_forward: number + 1 [216]": (
        "counts forwards inside of forwards; the module does not call itself, and the count ends at zero either way"
    ),
    "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py:768 FSDPParamGroup.finalize_backward: "
    "statement dropped [1693]": (
        "the reference to what was all-reduced last: it keeps memory from other streams, which the CPU has not"
    ),
    "lightning_mics/sharding/modules/broadcast_buffers.py:140 BufferBroadcast._compare: number + 1 [424]": (
        "a checksum is compared with its own complement, so all buffers count as differing and are broadcast: rank 0's "
        "either way, and only more is sent"
    ),
    "lightning_mics/sharding/modules/broadcast_buffers.py:113 BufferBroadcast._end_window: number + 1 [283]": (
        "comparisons after the first come at other windows; the buffers that differ are known from the first"
    ),
    "lightning_mics/sharding/accumulation_window.py:242 AccumulationWindow._set_boundary: statement dropped [579]": (
        "nothing is deferred, and each micro-step reduces along rails: the sums are those of the same terms, and only "
        "the traffic is another"
    ),
    "torch/distributed/fsdp/_fully_shard/_fsdp_param.py:1094 set_requires_grad_if_needed: condition negated [2702]": (
        "acts where `requires_grad` of a shard changes after its first use: the module's never does"
    ),
}


def argument(name: str) -> str | None:
    """Why a mutant changes no number; None if there is no argument.

    Args:
        name: Name of the mutant.
    """
    return ARGUMENTS.get(name)
