# shellcheck shell=bash
# What SLURM, EFA and NCCL need of the environment, on any of these instances; job.sh and the jobs of a sweep source it.
#
# It is little, because aws-ofi-nccl from 1.7 on (with libfabric from 1.18) knows the instance and sets what suits it:
# libfabric's provider, FI_EFA_FORK_SAFE, NCCL_BUFFSIZE, NCCL_P2P_NET_CHUNKSIZE, the chunk sizes of NVLS,
# NCCL_NET_FORCE_FLUSH, NCCL_PROTO where EFA does not deliver in order, NCCL_TOPO_FILE on p4d and p4de, NCCL_TUNER_PLUGIN
# (its src/platform-aws.cpp). So these, which older scripts have, are left out:
#   FI_PROVIDER=efa, NCCL_PROTO=simple           were for aws-ofi-nccl up to 1.5
#   FI_EFA_USE_DEVICE_RDMA=1                     was for libfabric before 1.18, on p4d and later; p3dn has no such thing
#   RDMAV_FORK_SAFE=1                            can break forks on newer kernels
#   NCCL_MIN_NCHANNELS                           more channels than the default mean messages too small for EFA
#   NCCL_NSOCKS_PERTHREAD, NCCL_SOCKET_NTHREADS  are for TCP
# "The cheatsheet" is 1.architectures/efa-cheatsheet.md of https://github.com/aws-samples/awsome-distributed-training; the
# list above is from there, too. The plugin is https://github.com/aws/aws-ofi-nccl

# Workers of a DataLoader are forked, which fails once the system is out of huge pages (the cheatsheet).
export FI_EFA_USE_HUGE_PAGE=0

# Where ranks first find each other: not over a container's virtual interfaces, which end at the node (the job scripts
# beside the cheatsheet). With a list, lo and docker must be named too (NCCL's user guide, "Environment Variables").
export NCCL_SOCKET_IFNAME='^lo,docker,veth'

# Collectives of different groups run side by side here: of rails, nodes and replicas. On the device they then begin in the
# order of the program, the same on all ranks (NCCL's user guide, since 2.26; nothing on older drivers than CUDA 12.3).
export NCCL_LAUNCH_ORDER_IMPLICIT="${NCCL_LAUNCH_ORDER_IMPLICIT:-1}"

# With NCCL_DEBUG=INFO the log has the network that NCCL uses, which is TCP if it does not find the plugin.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# What srun would be told by options of the same names; those of sbatch that it does not take over (srun's manual). Each
# rank has cores of its own, in the order of ranks. The default, "cyclic", deals out the sockets in turn, and half of the
# ranks would reach their GPU through the other socket: GPUs 0 to 3 are at the first, 4 to 7 at the second (for p4d, the
# plugin's topology/p4d-24xl-topo.xml; the other instances are taken to be alike). A rank that fails ends the others, which
# would wait for it.
export SLURM_CPU_BIND=cores
export SLURM_DISTRIBUTION=block:block
export SLURM_KILL_BAD_EXIT=1
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # not taken over since SLURM 22.05
    export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
fi
