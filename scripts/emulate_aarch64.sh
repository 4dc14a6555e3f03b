#!/bin/sh
# Verifies bundles on emulated aarch64 Linux: QEMU in user mode, Debian's arm64 Python, the wheels an ARM device would get.
#
#   sh scripts/emulate_aarch64.sh [-w FOLDER] [BUNDLE ...]
#
# Runs on Debian; needs apt's package index, pip's, and neither root nor binfmt_misc. FOLDER (0.5 GB) is kept and used again;
# without -w it is a temporary one. Without bundles, exports cmt_nano in fp32 and int8 for ONNX Runtime and OpenVINO
# (cmt-export on PATH). Takes about two minutes. The exit code is cmt-verify's, of the first bundle that fails. Emulation
# shows that the results are right, and nothing about speed.
set -eu

case "${1-} ${2:+value}" in
"-w value")
    mkdir -p "$2"
    work=$(cd "$2" && pwd)
    shift 2
    ;;
-*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
*)
    work=$(mktemp -d "${TMPDIR:-/tmp}/cmt_edge_aarch64.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    ;;
esac
repository=$(cd "$(dirname "$0")/.." && pwd)
root=$work/root
site=$work/site
say() { printf '%s\n' "== $*" >&2; }

fetch() { # FOLDER ARCHITECTURE PACKAGE...; uses the machine's sources and keys, but a package database of its own
    folder=$1 architecture=$2 state=$work/apt
    shift 2
    rm -rf "$state" "$folder.part"
    mkdir -p "$state/lists/partial" "$state/archives/partial" "$folder.part"
    : >"$state/status"
    apt() {
        apt-get -qq -o APT::Architecture="$architecture" -o APT::Architectures::="$architecture" -o Dir::State="$state" \
            -o Dir::State::status="$state/status" -o Dir::Cache="$state" -o APT::Sandbox::User="$(id -un)" "$@" >&2
    }
    apt update
    apt -o Debug::NoLocking=1 install --yes --download-only --no-install-recommends "$@"
    for package in "$state"/archives/*.deb; do
        dpkg-deb -x "$package" "$folder.part"
    done
    mv "$folder.part" "$folder"
    rm -rf "$state"
}

say "arm64 Python and QEMU from Debian's packages"
if [ ! -d "$root" ]; then
    fetch "$root" arm64 python3 libstdc++6
    [ -e "$root/lib" ] || ln -s usr/lib "$root/lib" # where Debian has merged /usr
fi
PATH=$PATH:$work/host/usr/bin
if ! qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64); then
    fetch "$work/host" "$(dpkg --print-architecture)" qemu-user-static
    find "$work/host" -type f ! -name 'qemu-aarch64*' -delete
    qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)
fi

# QEMU looks for files below $root first. The runtimes read these to know the CPU, and crash on an x86 machine's.
cpu=$root/sys/devices/system/cpu
mkdir -p "$root/proc" "$cpu/cpu0/regs/identification"
echo 0 | tee "$cpu/possible" >"$cpu/present"
echo 0x00000000414fd0b1 >"$cpu/cpu0/regs/identification/midr_el1" # Cortex-A76, as below
cat >"$root/proc/cpuinfo" <<END
processor	: 0
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

END
arm_python() { PYTHONSAFEPATH=1 PYTHONPATH=$site "$qemu" -cpu cortex-a76 -L "$root" "$root/usr/bin/python3" "$@"; }

say "cmt-edge[onnxruntime,openvino] and its wheels for aarch64"
rm -rf "$site" "$work/source"
mkdir "$work/source" # setuptools builds in the source folder
for part in pyproject.toml README.md LICENSE src cmt export calib deploy; do
    cp -R "$repository/$part" "$work/source"
done
version=$(arm_python -c 'import platform; print(platform.python_version())')
platforms=
for tag in 2014 _2_17 _2_24 _2_26 _2_27 _2_28 _2_31 _2_34 _2_35; do
    platforms="$platforms --platform manylinux${tag}_aarch64"
done
# shellcheck disable=SC2086 # one option a word
python3 -m pip install --quiet --disable-pip-version-check --target "$site" --only-binary=:all: --implementation cp \
    --python-version "$version" $platforms "$work/source[onnxruntime,openvino]" >&2

if [ $# = 0 ]; then
    say "bundles of cmt_nano"
    export_nano() { cmt-export --model cmt_nano --output "$work/bundles" --quiet "$@" >/dev/null; }
    for format in onnx openvino; do
        export_nano --format $format
        export_nano --format $format --precision int8 --data generated
    done
    set -- "$work"/bundles/*
fi
say "cmt-verify"
arm_python -c 'import platform; print(platform.machine(), *platform.libc_ver(), "Python", platform.python_version())'
for bundle in "$@"; do
    arm_python -c 'from cmt_edge.deploy.cli.verify import main; raise SystemExit(main())' "$bundle"
done
