# Sourced by the templates here, after scripts/job_environment.sh: servers and ranks as steps of a job.
# shellcheck shell=bash
# A job may have several components (#SBATCH hetjob): the ranks are in the first, servers in any.

declare -A server_pid=() server_node=()
logs="${LOG_DIR:-logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID"
mkdir -p "$logs"
told=
trap 'told=${told:-USR1}' USR1   # the job's time is nearly over
trap 'told=${told:-TERM}' TERM   # scancel, preemption

# As torchrun would set them; srun numbers its tasks by variables of its own.
# shellcheck disable=SC2016
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES)); exec "$@"'

say() { echo "$(date +%T) $*"; }

# nodes COMPONENT: the names of its nodes.
nodes() {
    local list="SLURM_JOB_NODELIST_HET_GROUP_$1"
    scontrol show hostnames "${!list:-$SLURM_JOB_NODELIST}"
}

# address NODE: where other nodes reach it; its name need not be known to the resolver.
address() { scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; }

# step COMPONENT NAME OPTIONS_OF_SRUN... -- COMMAND...: becomes srun; call it in the background.
step() {
    local component=$1 name=$2 options=()
    shift 2
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    if [[ -n ${SLURM_HET_SIZE:-} ]]; then options+=("--het-group=$component"); fi
    # --export=ALL: sbatch --export=A=... would have srun pass nothing else.
    exec srun --export=ALL --job-name="$name" --overlap --mem=0 --kill-on-bad-exit=1 "${options[@]}" "$@"
}

# signal_steps NAME SIGNAL: to the steps of that name, in all components. A signal to srun would end its tasks at once.
signal_steps() {
    local id name jobs="$SLURM_JOB_ID" component job
    for ((component = 1; component < ${SLURM_HET_SIZE:-1}; component++)); do
        job="SLURM_JOB_ID_HET_GROUP_$component"
        jobs+=",${!job}"
    done
    while read -r id name; do
        # It may have ended by itself; and SLURM 22.05 reports an error for a signal that it has delivered.
        if [[ $name == "$1" ]]; then scancel --signal="$2" "$id" 2>/dev/null || true; fi
    done < <(squeue --steps --noheader --jobs "$jobs" --format "%i %j")
}

# serve NAME COMPONENT NODE OPTIONS_OF_SRUN... -- FLAGS_OF_KVDISTILL_SERVE...: starts one server.
serve() {
    local name=$1 component=$2 node=$3 options=()
    shift 3
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    say "serving $name on $node; its log: $logs/serve_$name.log"
    : >"$logs/serve_$name.log"
    # Whoever reaches the node can ask it, unless its flags ask for a token. It picks its ports.
    step "$component" server --nodes=1 --ntasks=1 --nodelist="$node" "${options[@]}" -- \
        "$PYTHON" -m kvdistill serve --name "$name" --grpc-host 0.0.0.0 "$@" >>"$logs/serve_$name.log" 2>&1 &
    server_pid[$name]=$!
    server_node[$name]=$node
}

# wait_ready SECONDS: until every server has passed its self-test; writes where they listen to $logs/endpoints.txt.
wait_ready() {
    local name port log give_up_at=$((SECONDS + $1)) lines=
    for name in "${!server_pid[@]}"; do
        log="$logs/serve_$name.log"
        until port=$(sed -n 's/.*"event": "ready", "grpc_port": \([0-9]*\).*/\1/p' "$log") && [[ -n $port ]]; do
            if [[ -n $told ]]; then end_told; fi
            if ! kill -0 "${server_pid[$name]}" 2>/dev/null || ((SECONDS > give_up_at)); then
                say "the server of $name ended or was not ready in time; the end of $log:"
                tail -n 20 "$log"
                exit 1
            fi
            sleep 1
        done
        lines+="$name=$(address "${server_node[$name]}"):$port"$'\n'
    done
    printf '%s' "$lines" >"$logs/endpoints.tmp"
    mv "$logs/endpoints.tmp" "$logs/endpoints.txt"
}

# train ENDPOINTS OPTIONS_OF_SRUN... -- FLAGS_OF_THE_RECIPE...: the ranks, on the first component.
train() {
    local endpoints=$1 options=() status ranks asked=
    shift
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    MASTER_ADDR=$(address "$(nodes 0 | head -n 1)")
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT
    step 0 trainer "${options[@]}" -- bash -c "$as_rank" rank \
        "$PYTHON" -m experiments.train_multi_teacher_kv --teacher_endpoints "@$endpoints" "$@" &
    ranks=$!
    # A signal ends `wait`, not what it waits for.
    while wait "$ranks" && status=0 || status=$?; kill -0 "$ranks" 2>/dev/null; do
        if [[ -n $told && -z $asked ]]; then
            asked=yes
            say "SIG$told: asking for a checkpoint and an end"
            # They may have had SIGTERM already, and end at once when a signal comes twice.
            signal_steps trainer INT
        fi
    done
    if [[ -n $told ]]; then end_told; fi
    return "$status"
}

# end_servers: they answer what they have begun.
end_servers() {
    local give_up_at=$((SECONDS + ${DRAIN_SECONDS:-60})) pid
    signal_steps server TERM
    for pid in "${server_pid[@]}"; do
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < give_up_at)); do sleep 0.5; done
        kill "$pid" 2>/dev/null || true
    done
    server_pid=()
}

# end_told: ends a job that was told to. With its time over it is queued again, and goes on from its checkpoint.
end_told() {
    end_servers
    if [[ $told == USR1 ]]; then
        say "asking SLURM to run job $SLURM_JOB_ID again"
        scontrol requeue "$SLURM_JOB_ID" || true
    fi
    exit 143
}

trap end_servers EXIT
