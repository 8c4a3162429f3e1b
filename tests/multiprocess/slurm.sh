#!/usr/bin/env bash
# Runs a command next to a SLURM cluster of its own, two nodes on this machine, and takes the cluster down again:
#     tests/multiprocess/slurm.sh srun --ntasks=2 hostname
# Needs root and: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
# All of its files lie in a temporary folder; no service of the machine is started or changed.
set -euo pipefail
export PATH=$PATH:/usr/sbin

folder=$(mktemp -d)
chmod 755 "$folder"
daemons=()
end() {
  for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$folder"
}
trap end EXIT

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" > "$folder/munged.out" 2>&1 &
daemons+=($!)

mkdir "$folder/state" "$folder/spool_$(hostname)" "$folder/spool_$(hostname)-b"
cores=$(nproc --all)
cat > "$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
# A machine of the cluster listens on 127.0.0.1 only.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool_%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd_%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd_%n.log
# No cgroups and no accounting: neither is there in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=30
# The first node is the coordinator of JAX, whose name has to be found.
NodeName=$(hostname) NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cores
NodeName=$(hostname)-b NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cores
PartitionName=all Nodes=$(hostname),$(hostname)-b Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

slurmctld -D > "$folder/slurmctld.out" 2>&1 &
daemons+=($!)
for node in "$(hostname)" "$(hostname)-b"; do
  slurmd -D -N "$node" > "$folder/slurmd_$node.out" 2>&1 &
  daemons+=($!)
done
for _ in $(seq 100); do
  [ "$(timeout 2 sinfo --noheader --format=%t 2>/dev/null | sort -u)" = idle ] && ready=yes && break
  sleep 0.2
done
if [ -z "${ready:-}" ]; then
  echo "error: SLURM did not come up" >&2
  tail -n 20 "$folder"/*.out "$folder"/*.log >&2
  exit 1
fi
"$@"
