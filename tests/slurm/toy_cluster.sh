#!/usr/bin/env bash
# A SLURM cluster of fake nodes on this machine, for tests. Needs root, and slurmctld, slurmd and
# slurm-client; no systemd, no munge, no accounting.
#
#   toy_cluster.sh start BASE [NODES]    BASE/slurm.conf is the config: export SLURM_CONF
#   toy_cluster.sh stop BASE             ends jobs and daemons, and leaves no process
set -euo pipefail

usage() { echo "usage: $0 start BASE [NODES] | stop BASE" >&2; exit 64; }

# Print unused ports, below those that the system gives to outgoing connections.
free_ports() {
  python3 - "$1" <<'PYTHON'
import random
import socket
import sys

held = []
while len(held) < int(sys.argv[1]):
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", random.randrange(17000, 32000)))
        held.append(one)
    except OSError:
        one.close()
print(*(one.getsockname()[1] for one in held))
PYTHON
}

# AuthInfo: a requeued job waits until the credential of its last life has run out, 120 s by
# default; SLURM takes no less than 5. MaxArraySize: small enough for a test to exceed.
write_config() {
  local host ports port index=0
  host=$(hostname -s)
  read -ra ports <<<"$(free_ports $((num_nodes + 1)))"
  {
    cat <<CONFIG
ClusterName=toy
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/%n.pid
SlurmctldLogFile=$base/slurmctld.log
SlurmdLogFile=$base/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,defer_batch
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=3
InactiveLimit=0
MaxArraySize=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONFIG
    for port in "${ports[@]:1}"; do
      index=$((index + 1))
      echo "NodeName=node$index NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=1" \
        "RealMemory=4000 State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF"
  } >"$base/slurm.conf"
}

# The daemons' files, each with a process number that is only ours while its name fits.
daemons() {
  local file pid
  for file in "$base"/*.pid; do
    [[ -s $file ]] || continue
    pid=$(<"$file")
    # A process that has ended, and that nobody has asked about, has no command line.
    grep -qsa slurm "/proc/$pid/cmdline" && echo "$pid"
  done
  return 0
}

# Jobs, and SLURM's watchers of their steps: all have this cluster's config in their environment.
leftovers() {
  local folder pid
  for folder in /proc/[0-9]*; do
    pid=${folder#/proc/}
    tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" || continue
    if [[ $(cat "$folder/comm" 2>/dev/null) == slurmstepd ]] ||
      tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep -q '^SLURM_JOB_ID='; then
      echo "$pid"
    fi
  done
  return 0
}

# Wait up to so many seconds until a command prints nothing.
until_silent() {
  local deadline=$((SECONDS + $1))
  shift
  while [[ -n $("$@" 2>/dev/null) ]]; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

all_idle() {
  [[ $(sinfo --noheader --Node --partition=main --format=%t 2>/dev/null | grep -cx idle) == "$num_nodes" ]]
}

start_daemons() {
  local index
  slurmctld -f "$SLURM_CONF" || return 1
  for ((index = 1; index <= num_nodes; index++)); do
    mkdir -p "$base/spool/node$index"
    slurmd -N "node$index" -f "$SLURM_CONF" || return 1
  done
  for _ in {1..200}; do
    all_idle && return 0
    sleep 0.1
  done
  return 1
}

start() {
  local attempt
  mkdir -p "$base/state" "$base/spool"
  if [[ -n $(daemons) ]]; then
    echo "a cluster runs in $base already" >&2
    exit 1
  fi
  for attempt in 1 2 3; do # Another process may have taken a port in the meantime.
    write_config
    start_daemons && return 0
    echo "attempt $attempt failed; see $base/*.log" >&2
    stop
  done
  tail -n 5 "$base"/*.log >&2
  exit 1
}

stop() {
  local pids
  if [[ -n $(daemons) ]]; then
    timeout 10 scancel --user="$(id -u)" 2>/dev/null || true
    until_silent 15 timeout 10 squeue --noheader || true
  fi
  pids=$(daemons)
  [[ -z $pids ]] || kill $pids 2>/dev/null || true
  until_silent 10 daemons || kill -KILL $(daemons) 2>/dev/null || true
  pids=$(leftovers)
  [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
  until_silent 10 leftovers
}

[[ $# -ge 2 ]] || usage
mkdir -p "$2"
base=$(cd "$2" && pwd)
num_nodes=${3:-2}
export SLURM_CONF="$base/slurm.conf"
case $1 in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
