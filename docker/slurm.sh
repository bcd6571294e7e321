#!/usr/bin/env bash
# One run on every node of a SLURM job. Before its time is up it is told to save, goes back into the queue, and goes on from
# there when it starts again: the job's id, which stays, names the run's directory.
#
#   sbatch docker/slurm.sh model=smollm2_135m data.train=my.jsonl
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 docker/slurm.sh model=smollm2_135m data.train=my.jsonl
#   sbatch --export=ALL,POSTTRAIN_IMAGE=$PWD/posttrain.sif docker/slurm.sh model=smollm2_135m data.train=my.jsonl
#
# What stands behind the script are settings of `posttrain train`. sbatch hands its environment on: activate the one that has
# posttrain first, or name an Apptainer image of it (apptainer build posttrain.sif docker-daemon:posttrain:latest), whose /cache
# becomes ~/.cache (XDG_CACHE_HOME); folders outside of home and the working directory it sees by APPTAINER_BIND.
#
# Every node must see the run's directory (run.dir, else runs/slurm-JOBID here) and data.cache (else ~/.cache/posttrain). A
# recipe that streams its data needs data.streaming=true here too.
#
# Status: 0 done; 2 a mistake in the config or the data, found by `posttrain prepare`; 1 a failure. None of them goes back into
# the queue. A node that fails takes the job back there too, by SLURM itself, and the run goes on from its checkpoint.
#
# SLURM reads these lines; options of sbatch itself win over them.
#SBATCH --job-name=posttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# shellcheck disable=SC2329  # functions that traps and the nodes call
set -euo pipefail

say() { echo "slurm.sh: $*" >&2; }

if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then
  say "$1 is no setting; this script trains: give settings, key=value"
  exit 2
fi

# --- sizes: from SLURM, never typed twice ---

nodes=$SLURM_JOB_NUM_NODES
per_node=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}} # of a job without GPUs: one process a node
per_node=${per_node##*:}                                   # --gpus-per-node=a100:4
if ((per_node < 1)); then per_node=1; fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

export PER_NODE=$per_node
export RENDEZVOUS=${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000)) # below the ports that systems hand out by themselves
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}             # srun does not take it over from sbatch
threads=$((SRUN_CPUS_PER_TASK / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# At the notice torchrun passes SIGTERM on and kills its ranks after so long, which leaves a minute of the 300 s of --signal.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

settings=("run.processes=$((nodes * per_node))" "$@") # a launcher that starts another number is then an error
run_dir=
for setting in "$@"; do
  if [[ $setting == run.dir=* ]]; then run_dir=${setting#run.dir=}; fi
done
if [[ -z $run_dir ]]; then
  run_dir=runs/slurm-$SLURM_JOB_ID
  settings+=("run.dir=$run_dir")
fi

# --- the notice ---

told=
on_notice() { # B:USR1, to this script alone
  told=notice rang=yes
  say "the job's time is almost up: telling the run to save"
  # never by way of srun, which takes a SIGTERM for the wish to kill its tasks; scancel signals the job's steps, not this script
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
on_term() { # scancel by a person, or preemption: SLURM has told the steps itself
  told=term rang=yes
  say "the job is being ended: the run saves and stops"
}
trap on_notice USR1
trap on_term TERM

step() { # srun, waited for in a way that lets the traps run; $status is its exit status
  srun --export=ALL "$@" & # also where sbatch was told --export=NONE
  local srun=$! ended
  status=127
  while :; do
    rang='' ended=0
    wait "$srun" || ended=$?
    if [[ $ended -ne 127 ]]; then status=$ended; fi # 127: its status was had before a trap rang
    if [[ -z $rang ]]; then break; fi               # else a trap may have ended the waiting
  done
}

# --- on a node ---

inside() { # becomes the command, in the image if there is one: SLURM signals the process that it started itself
  if [[ -n ${POSTTRAIN_IMAGE:-} ]]; then
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}
    mkdir -p "$cache"
    exec env -u XDG_CACHE_HOME apptainer exec --nv --bind "$cache:/cache" "$POSTTRAIN_IMAGE" "$@"
  fi
  exec "$@"
}

ranks() { # the node's own rank and name are known here alone
  inside torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$PER_NODE" --local_addr="$SLURMD_NODENAME" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_endpoint="$RENDEZVOUS" \
    --rdzv_conf="is_host=$((SLURM_NODEID == 0)),read_timeout=600" -m posttrain "$@"
}
export -f inside ranks

checkpoints() { (shopt -s nullglob && echo "$run_dir"/checkpoints/step-*); }

# --- the run ---

say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes x $per_node processes, run.dir=$run_dir"

if [[ " $* " != *" data.streaming=true "* ]]; then # that has nothing to prepare
  step --nodes=1 --ntasks=1 bash -c 'inside "$@"' bash posttrain prepare "${settings[@]}"
  if [[ $status -ne 0 ]]; then
    say "posttrain prepare ended with status $status: not started, not requeued"
    exit "$status"
  fi
fi

if [[ -n $told ]]; then
  say "told to end before it began: not requeued"
  exit 143
fi
before=$(checkpoints)
# --wait: a node that is lost takes the others with it after so long; --kill-on-bad-exit would not let them save
step --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 bash -c 'ranks "$@"' bash "${settings[@]}"

if [[ $status -eq 0 ]]; then
  say "done: $run_dir"
elif [[ $told != notice ]]; then # torchrun's status says no more than that the run did not finish
  say "the run ended with status $status: not requeued${told:+ by this script}"
elif [[ $(checkpoints) == "$before" ]]; then
  say "no checkpoint was saved since this start, so another would come no further: not requeued; give more --time, or more" \
    "notice (--signal=B:USR1@900 with TORCH_ELASTIC_SHUTDOWN_TIMEOUT=840)"
elif scontrol requeue "$SLURM_JOB_ID"; then
  say "saved, and requeued"
else
  say "saved, but not requeued; to go on: the same sbatch command with run.dir=$run_dir"
fi
exit "$status"
