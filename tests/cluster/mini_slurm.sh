#!/usr/bin/env bash
# A real SLURM cluster of N "machines" on one computer, for tests.
#
#   mini_slurm.sh install                      install the packages it needs, and shellcheck (Debian, Ubuntu)
#   mini_slurm.sh start  -d DIR [options]      start, wait until every node is idle
#   mini_slurm.sh stop   -d DIR [--purge]      end everything that start began; always safe to repeat
#   mini_slurm.sh status -d DIR                what runs; exit 0 only when all of it does
#   eval "$(mini_slurm.sh env -d DIR)"         exports SLURM_CONF, so that sbatch, srun, ... find the cluster
#
#   mini_slurm.sh kill-node  -d DIR NODE       power cut: network gone, every process of the node gone
#   mini_slurm.sh boot-node  -d DIR NODE       switch it on again
#   mini_slurm.sh cut-node   -d DIR NODE       unplug its network cable (processes live on)
#   mini_slurm.sh heal-node  -d DIR NODE       plug it in again
#   mini_slurm.sh exec       -d DIR NODE CMD.. run a command on a node (as over ssh)
#   mini_slurm.sh release    -d DIR JOB        start a requeued job now (slurm holds it for 2 minutes)
#   mini_slurm.sh logs       -d DIR            print the daemons' logs
#   mini_slurm.sh mode                         print the mode that auto would choose
#
# Options of start:
#   -n, --nodes N       number of nodes, named node1..nodeN                     (2)
#   -c, --cpus C        CPUs each node claims, may exceed the real ones         (8)
#   -m, --mem MB        memory each node claims                                 (8000)
#   -g, --gpus G        pretended GPUs per node; jobs see CUDA_VISIBLE_DEVICES  (2)
#   --mode MODE         netns: every node has its own network, host name, processes, /dev/shm
#                       ports: every node is only a slurmd on its own port of this host
#                       auto:  netns where this user may make namespaces, else ports (auto)
#   --private-tmp       (netns) every node has its own empty /tmp
#   --decoy             (netns) every node also has a docker0 with the same address 172.17.0.1
#   --conf FILE         extra lines for slurm.conf (appended)
#   --timeout S         how long start waits for the nodes                      (60)
#   --with PID          stop and purge when that process has ended
#
# Partitions: main (default), low (its jobs get preempted by `high`: SIGTERM, grace, requeue), high.
# Root is needed for `install` and for mode netns. Jobs run as whoever submits them.
# In mode ports all nodes share this host's name and address, and the names node1.. do not resolve.
# Any number of clusters may start and run at the same time: each holds a slot, from which its network and ports follow.
# Tried with slurm 22.05 (Debian 12); needs no systemd.
set -Eeuo pipefail
export LC_ALL=C

die()  { echo "mini_slurm: $*" >&2; exit 1; }
note() { echo "mini_slurm: $*" >&2; }

SELF=$(readlink -f "${BASH_SOURCE[0]}")
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

# ---------------------------------------------------------------- packages
have() { local c; for c; do command -v "$c" >/dev/null || return 1; done; }
have_slurm() { have slurmctld slurmd srun sbatch munged ip unshare nsenter flock; }

install_packages() {
    local pkgs=()
    have_slurm || pkgs+=(slurmctld slurmd slurm-client munge iproute2 util-linux)
    have shellcheck || pkgs+=(shellcheck)
    ((${#pkgs[@]})) || return 0
    have apt-get || die "needs: ${pkgs[*]} (no apt-get here: install them by hand)"
    ((EUID == 0)) || die "install needs root"
    # Packages may start services of their own; a policy that says no keeps this machine quiet.
    local policy=/usr/sbin/policy-rc.d made=0 rc=0
    if [[ ! -e $policy ]]; then printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"; made=1; fi
    note "installing ${pkgs[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${pkgs[@]}"; } >&2 </dev/null || rc=$?
    ((made)) && rm -f "$policy"
    ((rc == 0)) || die "apt-get failed ($rc)"
    have_slurm || die "still no slurmctld, slurmd, srun or munged on PATH"
}

# ---------------------------------------------------------------- processes
# run/procs holds one line per process begun: "name pid starttime". The start time (field 22 of
# /proc/PID/stat) tells a process from a later one that got the same number.
starttime() {                   # fails for a process that is gone or a zombie
    local s f; { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 1
    read -ra f <<<"${s##*) }"; [[ ${f[0]} != [ZX] ]] && echo "${f[19]}"
}
record() { echo "$1 $2 $(starttime "$2")" >>"$RUN/procs"; }
proc_pid() {                    # newest living process recorded under a name
    local n p t last=""
    [[ -f $RUN/procs ]] || return 1
    while read -r n p t; do
        [[ $n == "$1" && $(starttime "$p") == "$t" ]] && last=$p
    done <"$RUN/procs"
    [[ -n $last ]] && echo "$last"
}
alive() { proc_pid "$1" >/dev/null; }
gone() { ! alive "$1"; }
end_proc() {                    # end_proc NAME SIGNAL SECONDS: signal, wait, then SIGKILL
    local p i; p=$(proc_pid "$1") || return 0
    kill "-$2" "$p" 2>/dev/null || return 0
    for ((i = 0; i < $3 * 20; i++)); do alive "$1" || return 0; sleep 0.05; done
    kill -KILL "$p" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do alive "$1" || return 0; sleep 0.05; done
    note "$1 ($p) does not end"
}
wait_for() {                    # wait_for SECONDS WHAT COMMAND...
    local limit=$((SECONDS + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < limit)) || { note "gave up waiting for $what"; return 1; }
        sleep 0.05
    done
}
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
# Everything is started in a session of its own, away from the caller's terminal and locks.
daemon() {                      # daemon NAME LOG COMMAND...
    local name=$1 log=$2; shift 2
    setsid "$@" >>"$log" 2>&1 </dev/null 8>&- 9>&- &
    record "$name" $!
}

# ---------------------------------------------------------------- layout
load() {
    [[ -n ${DIR:-} ]] || die "which cluster? give -d DIR"
    DIR=$(readlink -m "$DIR"); RUN=$DIR/run
    [[ -f $DIR/cluster.env ]] || return 1
    # shellcheck disable=SC1091
    source "$DIR/cluster.env"
    export SLURM_CONF=$DIR/slurm.conf
}
lock() { exec 9>"$DIR/.lock"; flock -w 60 9 || die "$DIR is locked by another mini_slurm.sh"; }
node_number() { [[ $1 =~ ^node([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 1 && BASH_REMATCH[1] <= NODES)) && echo "${BASH_REMATCH[1]}"; }

can_netns() {
    ((EUID == 0)) && unshare --net --uts --ipc --mount --pid --fork --mount-proc \
        ip link add probe0 type veth peer name probe1 >/dev/null 2>&1
}
# A slot is a locked file. The process `switch` keeps the lock for as long as the cluster runs, so that a slot is
# free again however the cluster ended. 300 slots of 60 ports each, below the ephemeral range, and one network each.
take_slot() {
    local folder=/tmp/mini-slurm-$EUID i slot p ok
    mkdir -p "$folder"
    for ((i = 0; i < 300; i++)); do
        slot=$(((RANDOM + i) % 300)); NET=10.$((100 + slot / 100)).$((slot % 100)); PORT=$((12000 + slot * 60)); ID=$EUID-$slot
        exec 8>"$folder/$slot"
        flock -n 8 || continue
        ok=1                    # another user's cluster, or something else altogether, may be there
        ip -4 addr show 2>/dev/null | grep -q "inet $NET\." && ok=0
        for ((p = PORT; ok && p < PORT + 11 + NODES; p++)); do if listening "$p"; then ok=0; fi; done
        if ((ok)); then return; fi
    done
    die "no free network and ports"
}

write_config() {
    local host i ctl_ip=127.0.0.1 gres="" fake=""
    host=$(hostname -s 2>/dev/null || cat /proc/sys/kernel/hostname); host=${host%%.*}
    [[ $MODE == netns ]] && ctl_ip=$NET.254
    if ((GPUS)); then gres=" Gres=gpu:fake:$GPUS"; fake="GresTypes=gpu"; fi
    # Times are a test's, not a cluster's: there SlurmdTimeout is 300 s and KillWait 30 s.
    cat >"$DIR/slurm.conf" <<EOF
ClusterName=mini
SlurmctldHost=$host($ctl_ip)
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
AuthType=auth/munge
AuthInfo=socket=$SOCK/munge.sock
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$SOCK/spool-%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,bf_continue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
DefMemPerCPU=$((MEM / CPUS))
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
$fake
EOF
    for ((i = 1; i <= NODES; i++)); do
        if [[ $MODE == netns ]]; then
            echo "NodeName=node$i NodeAddr=$NET.$i CPUs=$CPUS RealMemory=$MEM$gres"
        else
            echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + 10 + i)) CPUs=$CPUS RealMemory=$MEM$gres"
        fi
    done >>"$DIR/slurm.conf"
    cat >>"$DIR/slurm.conf" <<EOF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=01:00:00 State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low  Nodes=ALL MaxTime=INFINITE DefaultTime=01:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=01:00:00 State=UP PriorityTier=10 PreemptMode=OFF
EOF
    [[ -n $EXTRA ]] && cat "$EXTRA" >>"$DIR/slurm.conf"

    : >"$DIR/gres.conf"
    if ((GPUS)); then           # any character device will do; the digits at the end become the index
        mkdir -p "$DIR/dev"
        for ((i = 0; i < GPUS; i++)); do
            mknod "$DIR/dev/nvidia$i" c 1 3 2>/dev/null || ln -sf /dev/null "$DIR/dev/nvidia$i"
        done
        local files="$DIR/dev/nvidia0"; ((GPUS > 1)) && files="$DIR/dev/nvidia[0-$((GPUS - 1))]"
        echo "NodeName=node[1-$NODES] Name=gpu Type=fake File=$files" >"$DIR/gres.conf"
    fi
    # slurmd 23.11 and later always loads a cgroup plugin; 24.05 and later has one that does nothing.
    local version; version=$(slurmctld -V | sed 's/[^0-9]*\([0-9]*\).*/\1/')
    if ((version >= 24)); then echo "CgroupPlugin=disabled"; else echo "CgroupPlugin=cgroup/v1"; fi >"$DIR/cgroup.conf"

    { echo "127.0.0.1 localhost"
      if [[ $MODE == netns ]]; then
          for ((i = 1; i <= NODES; i++)); do echo "$NET.$i node$i"; done
          echo "$NET.254 $host"
      fi; } >"$DIR/hosts"
    : >"$DIR/resolv.conf"
}

# ---------------------------------------------------------------- network of mode netns
# One namespace is the switch (a bridge). It is not this host's, so that a firewall or Docker here
# does not see the traffic between nodes. A port leads to this host (the login node), one to each node.
start_switch() {
    local p
    if [[ $MODE == ports ]]; then    # only keeps the slot
        setsid sleep infinity >>"$DIR/log/switch.log" 2>&1 </dev/null 9>&- &
        record switch $!; return
    fi
    setsid unshare --net sleep infinity >>"$DIR/log/switch.log" 2>&1 </dev/null 9>&- &
    record switch $!
    p=$(proc_pid switch)
    wait_for 20 "the switch" own_netns "$p" || return 1
    nsenter -t "$p" -n sh -c 'ip link add br0 type bridge && ip link set br0 up'
    ip link del "msl$ID" 2>/dev/null || true      # of a cluster that was killed
    ip link add "msl$ID" type veth peer name login netns "$p"
    nsenter -t "$p" -n sh -c 'ip link set login master br0 && ip link set login up'
    ip addr add "$NET.254/24" dev "msl$ID"; ip link set "msl$ID" up
}
own_netns() { [[ -e /proc/$1/ns/net && $(readlink "/proc/$1/ns/net") != "$(readlink /proc/self/ns/net)" ]]; }
child_of() { local c=""; { read -r c _ <"/proc/$1/task/$1/children"; } 2>/dev/null || true; [[ -n $c ]] && echo "$c"; }

# ---------------------------------------------------------------- nodes
boot_node() {
    local i=$1 p init name=node$1
    mkdir -p "$SOCK/spool-$name"
    alive "$name" && { note "$name runs already"; return 0; }
    if [[ $MODE == ports ]]; then
        daemon "$name" "$DIR/log/$name.out" slurmd -D -f "$DIR/slurm.conf" -N "$name"
        return
    fi
    daemon "$name" "$DIR/log/$name.out" unshare --net --uts --ipc --mount --propagation private --pid --fork \
        --kill-child=KILL --mount-proc bash "$SELF" __node -d "$DIR" "$i"
    p=$(proc_pid "$name")
    wait_for 20 "$name" child_of "$p" || return 1
    init=$(child_of "$p"); wait_for 20 "$name's network" own_netns "$init" || return 1
    unplug "$i"
    ip link add "$name" netns "$(proc_pid switch)" type veth peer name eth0 netns "$init"
    nsenter -t "$(proc_pid switch)" -n sh -c "ip link set $name master br0 && ip link set $name up"
}
node_main() {                   # process 1 of a node
    local i=$1
    hostname "node$i" 2>/dev/null || echo "node$i" >/proc/sys/kernel/hostname
    mount --bind "$DIR/hosts" /etc/hosts
    [[ -e /etc/resolv.conf ]] && mount --bind "$DIR/resolv.conf" /etc/resolv.conf
    mount -t tmpfs -o size=50% tmpfs /dev/shm
    if ((PRIVATE_TMP)); then mount -t tmpfs -o mode=1777 tmpfs /tmp; fi
    ip link set lo up
    wait_for 20 eth0 ip link show eth0
    ip addr add "$NET.$i/24" dev eth0; ip link set eth0 up
    ((DECOY)) && { ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up; }
    slurmd -D -f "$DIR/slurm.conf" -N "node$i" &
    wait $!                     # bash reaps the orphans of the node's jobs meanwhile
}
kill_node() {
    local i=$1 p name=node$1
    if [[ $MODE == netns ]]; then cut_node "$i" down || true; fi
    p=$(proc_pid "$name") || return 0
    if [[ $MODE == ports ]]; then kill_tree "$name"; fi
    kill -KILL "$p" 2>/dev/null || true
    wait_for 20 "the end of $name" gone "$name" || return 1
    # Unsent data of dead sockets can hold a network namespace, and so its cable, for minutes.
    if [[ $MODE == netns ]]; then unplug "$i"; fi
}
unplug() { local s; if s=$(proc_pid switch); then nsenter -t "$s" -n ip link del "node$1" 2>/dev/null || true; fi; }
cut_node() {                    # cut_node I down|up: the switch's side of the cable
    local s; s=$(proc_pid switch) || return 1
    nsenter -t "$s" -n ip link set "node$1" "$2" 2>/dev/null
}
kill_tree() {                   # mode ports: end the job processes of one node, or of all
    # No namespace holds them. A slurmstepd is known by the log that it keeps open, a process that
    # left its tree by the variables that slurm gave it.
    local node=${1:-} log=$DIR/log/slurmd.${1:-*}.log d f p pids=() kids
    for d in /proc/[0-9]*; do
        p=""; { read -rd '' p <"$d/cmdline"; } 2>/dev/null || true
        if [[ $p == slurmstepd:* ]]; then
            for f in "$d"/fd/*; do
                # shellcheck disable=SC2053
                if [[ $(readlink "$f" 2>/dev/null) == $log ]]; then pids+=("${d#/proc/}"); break; fi
            done
        elif { grep -qzFx "SLURM_CONF=$DIR/slurm.conf" "$d/environ" && grep -qz "^SLURMD_NODENAME=${node:-.*}\$" "$d/environ"; } 2>/dev/null; then
            pids+=("${d#/proc/}")
        fi
    done
    for ((p = 0; p < ${#pids[@]}; p++)); do     # and all that descends from it
        kids=(); { read -ra kids <"/proc/${pids[p]}/task/${pids[p]}/children"; } 2>/dev/null || true
        pids+=(${kids[@]+"${kids[@]}"})
    done
    if ((${#pids[@]})); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
}

# ---------------------------------------------------------------- commands
ctld_answers_or_died() { ! alive slurmctld || scontrol ping; }
all_idle() { [[ $(sinfo -h -N -p main -o '%T' 2>/dev/null | grep -cx 'idle\|mixed\|allocated') == "$NODES" ]]; }

cmd_start() {
    local t0=$SECONDS i owner="" limit=60
    NODES=2 CPUS=8 MEM=8000 GPUS=2 MODE=auto PRIVATE_TMP=0 DECOY=0 EXTRA=""
    while (($#)); do case $1 in
        -n|--nodes) NODES=$2; shift 2;;  -c|--cpus) CPUS=$2; shift 2;;   -m|--mem) MEM=$2; shift 2;;
        -g|--gpus) GPUS=$2; shift 2;;    --mode) MODE=$2; shift 2;;      --private-tmp) PRIVATE_TMP=1; shift;;
        --decoy) DECOY=1; shift;;        --timeout) limit=$2; shift 2;;  --with) owner=$2; shift 2;;
        --conf) EXTRA=$(readlink -f "$2"); shift 2;;
        *) die "start: what is $1?";;
    esac; done
    ((NODES >= 1 && NODES <= 48)) || die "1 to 48 nodes"
    [[ -n ${DIR:-} ]] || die "start: where? give -d DIR"
    have_slurm || die "SLURM is not installed (mini_slurm.sh install)"
    case $MODE in
        auto) if can_netns; then MODE=netns; else MODE=ports; fi;;
        netns) can_netns || die "mode netns needs root and the right to make namespaces";;
        ports) ;;
        *) die "mode: auto, netns or ports";;
    esac
    DIR=$(readlink -m "$DIR"); RUN=$DIR/run
    mkdir -p "$DIR"; lock
    if [[ -f $DIR/cluster.env ]] && any_alive; then die "a cluster runs in $DIR already (stop it first)"; fi
    clean_up_files
    mkdir -p "$DIR"/{run,log,state}; chmod 755 "$DIR" "$RUN"
    take_slot
    SOCK=$RUN; if ((${#DIR} > 55)); then SOCK=/tmp/msl-$ID; rm -rf -- "$SOCK"; mkdir -p "$SOCK"; chmod 755 "$SOCK"; fi  # unix sockets: 107 bytes
    if ((PRIVATE_TMP)) && [[ $DIR/ == /tmp/* || $SOCK/ == /tmp/* ]]; then die "--private-tmp needs a short DIR outside /tmp"; fi
    declare -p NODES CPUS MEM GPUS MODE PRIVATE_TMP DECOY ID SOCK NET PORT | sed 's/^declare -[^ ]* //' >"$DIR/cluster.env"
    trap 'note "start failed; the last lines of the logs:"; tail -n 5 "$DIR"/log/* >&2 || true; stop_all; exit 1' ERR
    trap 'stop_all; exit 130' INT TERM
    export SLURM_CONF=$DIR/slurm.conf

    : >"$RUN/procs"
    start_switch                # the only process that inherits the slot's lock
    exec 8>&-
    ( umask 077; head -c 1024 /dev/urandom >"$DIR/munge.key" )
    write_config
    daemon munged "$DIR/log/munged.out" munged --foreground --force --num-threads=4 --key-file="$DIR/munge.key" --socket="$SOCK/munge.sock" \
        --pid-file="$RUN/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$RUN/munge.seed"
    wait_for 30 munged munge -S "$SOCK/munge.sock" -n
    daemon slurmctld "$DIR/log/slurmctld.out" slurmctld -D -f "$DIR/slurm.conf"
    wait_for "$limit" slurmctld ctld_answers_or_died; alive slurmctld
    for ((i = 1; i <= NODES; i++)); do boot_node "$i"; done
    wait_for "$limit" "the nodes" all_idle
    if [[ -n $owner ]]; then daemon guard "$DIR/log/guard.log" bash "$SELF" __guard -d "$DIR" "$owner" "$(starttime "$owner" || echo gone)"; fi
    trap - ERR INT TERM
    note "$NODES nodes ($MODE) up in $((SECONDS - t0)) s. Now: export SLURM_CONF=$DIR/slurm.conf"
}
guard_main() {                  # guard_main PID STARTTIME
    while [[ $(starttime "$1") == "$2" ]]; do sleep 1; done
    setsid bash "$SELF" stop -d "$DIR" --purge </dev/null &
}
no_jobs() { [[ -z $(squeue -h 2>/dev/null) ]]; }
any_alive() { local n _; [[ -f $RUN/procs ]] && while read -r n _; do alive "$n" && return 0; done <"$RUN/procs"; return 1; }
clean_up_files() {
    rm -rf -- "${DIR:?}"/{state,log,run,dev,hosts,resolv.conf,slurm.conf,gres.conf,cgroup.conf,munge.key,cluster.env}
    if [[ ${SOCK:-} == /tmp/msl-* ]]; then rm -rf -- "$SOCK"; fi
}
stop_all() {
    local i
    end_proc guard KILL 1
    if [[ $MODE == ports ]]; then     # no namespaces: let slurm end its jobs, then look for leftovers
        if alive slurmctld; then timeout 5 scancel --full -u "$(id -un)" 2>/dev/null || true
            wait_for 4 "the jobs' end" no_jobs || true; fi
        for ((i = 1; i <= NODES; i++)); do end_proc "node$i" TERM 5; done
        kill_tree
    else
        for ((i = 1; i <= NODES; i++)); do end_proc "node$i" KILL 5; done
    fi
    end_proc slurmctld TERM 10
    end_proc munged TERM 5
    if [[ $MODE == netns ]]; then ip link del "msl$ID" 2>/dev/null || true; fi
    end_proc switch TERM 5
}
cmd_stop() {
    local purge=0; [[ ${1:-} == --purge ]] && purge=1
    load || { note "no cluster in $DIR"; return 0; }
    lock
    [[ -f $DIR/cluster.env ]] || return 0         # another stop was faster
    stop_all
    if ((purge)); then clean_up_files; rm -f -- "$DIR/.lock"; rmdir "$DIR" 2>/dev/null || true; fi
    note "stopped"
}
cmd_status() {
    load || die "no cluster in $DIR"
    local n bad=0 names=(munged slurmctld switch) i
    for ((i = 1; i <= NODES; i++)); do names+=("node$i"); done
    for n in "${names[@]}"; do
        if alive "$n"; then printf '%-10s up    pid %s\n' "$n" "$(proc_pid "$n")"; else printf '%-10s DOWN\n' "$n"; bad=1; fi
    done
    if alive slurmctld; then timeout 10 sinfo -N -o '%10N %10P %10T %5c %7m %14G %E' || bad=1; fi
    return $bad
}
cmd_exec() {
    load || die "no cluster in $DIR"; local i name=${1:?node} p; shift
    i=$(node_number "$name") || die "no node $name"
    if [[ $MODE == ports ]]; then exec "$@"; fi
    p=$(proc_pid "$name") || die "$name is off"
    exec nsenter -t "$(child_of "$p")" -n -u -i -m -p --wd="$PWD" -- "$@"
}
cmd_node() {                    # kill|boot|cut|heal NODE
    local what=$1 i; shift
    load || die "no cluster in $DIR"; i=$(node_number "${1:?node}") || die "no node $1"
    [[ $MODE == netns || $what == kill || $what == boot ]] || die "$what-node needs mode netns"
    lock
    case $what in kill) kill_node "$i";; boot) boot_node "$i";; cut) cut_node "$i" down;; heal) cut_node "$i" up;; esac
}
cmd_release() {                 # a launch within a second of the requeue would be refused: "credential revoked"
    load || die "no cluster in $DIR"; local job=${1:?job}
    wait_for 60 "job $job to be pending" job_held "$job" || return 1
    sleep 2.5; scontrol update "JobId=$job" StartTime=now
}
job_held() { [[ $(squeue -h -j "$1" -o '%T %r') == "PENDING BeginTime" ]]; }

CMD=${1:-help}; (($#)) && shift
ARGS=(); DIR=${MINI_SLURM_DIR:-}
while (($#)); do case $1 in
    -d|--dir) DIR=${2:?directory}; shift 2;;
    --) shift; ARGS+=("$@"); break;;
    *) ARGS+=("$1"); shift; if [[ $CMD == exec && ${#ARGS[@]} -ge 2 ]]; then ARGS+=("$@"); break; fi;;
esac; done
set -- ${ARGS[@]+"${ARGS[@]}"}
case $CMD in
    install) install_packages;;
    mode) if can_netns; then echo netns; else echo ports; fi;;
    start) cmd_start "$@";;   stop) cmd_stop "$@";;  status) cmd_status;;
    env) load || die "no cluster in $DIR"; printf 'export SLURM_CONF=%q\n' "$SLURM_CONF";;
    exec) cmd_exec "$@";;
    kill-node|boot-node|cut-node|heal-node) cmd_node "${CMD%-node}" "$@";;
    release) cmd_release "$@";;
    logs) load || die "no cluster in $DIR"; tail -n 40 "$DIR"/log/*;;
    __node) load; node_main "$@";;
    __guard) load; guard_main "$@";;
    help|-h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$SELF";;
    *) die "what is $CMD? (mini_slurm.sh help)";;
esac
