#!/usr/bin/env bash
# From a folder of photographs to a demo model, stage by stage:
#
#   bash docs/demo/make.sh KIND PHOTOS NAMES OUTPUT
#
#   KIND    gpu: a model like weights/demo, on one large GPU and 16 cores
#           cpu: a smaller one, an hour and a half of two cores
#           tiny: a rehearsal of all stages in minutes, with models that have learned nothing
#   PHOTOS  train/<class>/* and val/<class>/*
#   NAMES   a JSON file, class folder -> name
#   OUTPUT  gets a folder for each stage and times.txt; generator/ is the model, with its tokenizer and refiner
#
# A stage that was stopped is continued, one that is done is skipped. MINUTES=9 stops after so long, at a checkpoint, with
# exit code 3: the same command continues. Runs from the top of the repository; needs bash 4.4 and coreutils.
set -euo pipefail

refuse() { echo "$1" >&2; exit 2; }
[ $# -eq 4 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
KIND=$1 PHOTOS=$2 NAMES=$3 OUTPUT=$4
PYTHON=${PYTHON:-python} MINUTES=${MINUTES:-10080}
[[ ${BASH_VERSINFO[0]}${BASH_VERSINFO[1]} -ge 44 ]] || refuse "bash is $BASH_VERSION; 4.4 or newer is needed"
command -v timeout > /dev/null || refuse "there is no timeout(1); install coreutils"
[[ $MINUTES =~ ^[0-9]+$ ]] || refuse "MINUTES is $MINUTES; give a whole number"
[[ -d $PHOTOS/train && -d $PHOTOS/val ]] || refuse "$PHOTOS has no train/ and val/; give a folder that has"
[[ -f $NAMES ]] || refuse "$NAMES is no file; give one that maps class folders to names"

TINY=() FEWER=() FEW=() READERS=() SAMPLES=2000 LENGTHS=(1 4 16 32 64 128 256)
case $KIND in
cpu) CONFIG=configs/cpu ;;
gpu) CONFIG=configs/gpu READERS=(--num-workers 12 --batch-size 256) ;;
tiny)
    CONFIG=configs/cpu SAMPLES=20
    TINY=(--steps 4 --batch-size 4 --warmup-steps 1 --evaluate-every 2 --checkpoint-every 2 --compile false)
    FEWER=("${TINY[@]}" --validation-images 8)
    FEW=(--max-images 20)
    ;;
*) refuse "KIND is $KIND; allowed: cpu, gpu, tiny" ;;
esac
mkdir -p "$OUTPUT"
END=$((SECONDS + MINUTES * 60)) CHILD=

# timeout(1) takes its command out of the terminal's group: one signal reaches it, ours, and it saves
stop() { [ -z "$CHILD" ] || { kill -TERM "$CHILD" 2> /dev/null && wait "$CHILD" || true; }; exit 130; }
trap stop INT TERM

# stage NAME ARGUMENTS: run a script once, whole, in the time that is left
stage() {
    local name=$1 begun=$SECONDS left=$((END - SECONDS)) code=0 spent=0 resume=()
    shift
    [ ! -e "$OUTPUT/$name.done" ] || return 0
    # the first start has no checkpoint
    if compgen -G "$OUTPUT/$name/checkpoints/step-*" > /dev/null; then resume=(--resume); fi
    if [ "$left" -gt 0 ]; then
        echo "== $name"
        timeout --signal TERM --kill-after 60 "$left" "$PYTHON" "$@" "${resume[@]}" &
        CHILD=$!
        wait "$CHILD" || code=$?
        CHILD=
    else
        code=124
    fi
    [ ! -e "$OUTPUT/$name.seconds" ] || spent=$(< "$OUTPUT/$name.seconds")
    spent=$((spent + SECONDS - begun))
    echo "$spent" > "$OUTPUT/$name.seconds"
    # 137: it was still saving a minute later
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "out of time in stage $name; the same command continues" >&2; exit 3; fi
    [ "$code" -eq 0 ] || exit "$code"
    echo "$name: $spent s" | tee -a "$OUTPUT/times.txt"
    touch "$OUTPUT/$name.done"
}

stage tokenizer train_tokenizer.py --config $CONFIG-tokenizer.yaml --data-dir "$PHOTOS" \
    --output-dir "$OUTPUT/tokenizer" "${FEWER[@]}"
stage tokens extract_tokens.py --tokenizer "$OUTPUT/tokenizer" --data-dir "$PHOTOS" --views flip \
    --class-names "$NAMES" --output-dir "$OUTPUT/tokens" "${READERS[@]}"
stage generator train_ar.py --config $CONFIG-generator.yaml --tokens "$OUTPUT/tokens" \
    --output-dir "$OUTPUT/generator" "${FEWER[@]}"
stage refiner train_refiner.py --config $CONFIG-refiner.yaml --tokenizer "$OUTPUT/generator/tokenizer" --data-dir "$PHOTOS" \
    --class-names "$NAMES" --output-dir "$OUTPUT/refiner" "${FEWER[@]}"
[ -d "$OUTPUT/generator/refiner" ] || {
    cp -r "$OUTPUT/refiner/refiner" "$OUTPUT/generator/refiner.partial"
    mv "$OUTPUT/generator/refiner.partial" "$OUTPUT/generator/refiner"
}
# figures and a sheet as in docs/demo.md, of every fifth of 100 classes
CLASSES=$(find "$PHOTOS/val" -mindepth 1 -maxdepth 1 | wc -l)
stage reconstruction benchmark.py reconstruction --tokenizer "$OUTPUT/tokenizer" --data-dir "$PHOTOS" \
    --num-tokens "${LENGTHS[@]}" --perceptual none --inception none --output-dir "$OUTPUT/reconstruction" "${FEW[@]}"
# the constant guidance scale with the lowest distance is stored with the model
stage sweep benchmark.py fid --model "$OUTPUT/generator" --reference "$PHOTOS/val" --features weights/features.safetensors \
    --num-samples $((SAMPLES / 2)) --num-tokens 32 256 --sweep cfg_scale=1,2,3 --write-settings --output-dir "$OUTPUT/sweep"
stage fid benchmark.py fid --model "$OUTPUT/generator" --reference "$PHOTOS/val" --class-names "$NAMES" \
    --features weights/features.safetensors --num-samples $SAMPLES --num-tokens "${LENGTHS[@]}" --anchors \
    --output-dir "$OUTPUT/fid"
stage sheet sample.py --model "$OUTPUT/generator" --class-labels $(seq 0 $(((CLASSES + 19) / 20)) $((CLASSES - 1))) --seed 0 \
    --previews 4 16 32 64 128 --refine-previews --output-dir "$OUTPUT/sheet"
