#!/bin/sh
# From nothing to a verified int8 bundle, on the embedded CIFAR-10 model, without a data set. Run it with `make demo`.
set -eu
OUT="${OUT:-out/demo}"

BOLD='' PLAIN=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then BOLD='\033[1m' PLAIN='\033[0m'; fi

# Shows a command, folded to 80 columns so that it can still be pasted, and runs it.
say() {
    printf "\n$BOLD"
    printf '$ %s\n' "$*" | fold -s -w 78 | sed '$!s/ *$/ \\/'
    printf "$PLAIN"
    "$@"
}

say cmt-edge export --model cmt_nano --format openvino --precision fp32 --output "$OUT"
say cmt-edge export --model cmt_nano --format openvino --precision int8 --data synthetic --output "$OUT"
say cmt-edge verify "$OUT/cmt_nano_int8_openvino"
say cmt-edge bench "$OUT/cmt_nano_fp32_openvino" "$OUT/cmt_nano_int8_openvino" --seconds 3 --markdown "$OUT/benchmark.md"
say python examples/draw_images.py "$OUT/pictures"
say cmt-edge predict "$OUT/cmt_nano_int8_openvino" "$OUT/pictures" --topk 3

cat <<END

The bundle is $OUT/cmt_nano_int8_openvino; its report is report.html
inside. cmt_nano is so small that overheads decide its latency: int8 saves size
here, and time on the larger models (README, "Measured").

next:
  . .venv/bin/activate
  cmt-edge predict $OUT/cmt_nano_int8_openvino YOUR_IMAGE.jpg
  cmt-edge export --model cmt_xs --weights YOUR_CHECKPOINT.pth \\
             --num-classes N --precision int8 \\
             --data TRAIN_IMAGES --eval-data TEST_IMAGES
  cmt-edge models
END
