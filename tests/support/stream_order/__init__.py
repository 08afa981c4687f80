"""A simulation of CUDA's streams, events and caching allocator on CPU tensors, for FSDP2 and this package as they are.

On a GPU an operation is enqueued on a stream and runs later. Two operations on different streams are ordered only if
one stream waits for the other. Here operations run at once, so results are always those of a correct program; what the
simulation keeps is which operation is ordered before which::

    streams      vector clocks: which operations of each stream are ordered before what a stream enqueues next
    memory       who has read and written which bytes, and who may still do so when the allocator hands them out again
    simulation   streams and events in place of torch's, and a look at every operation
    jobs         option sets and usages: what is run under the simulation

Found are races, memory that is reused too early, and waits of the host. Not modeled are the kernels themselves and what
happens inside of NCCL.
"""
