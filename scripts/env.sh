# Makes .venv with the pinned dependencies, once, and activates it. The other scripts source this file.
#
#   PYTHON  the interpreter to start from (default: python3); 3.11 or 3.12
#   ENV     extra requirement files (default: none), such as requirements-dev.txt
#
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_make_env() {
    local python=${PYTHON:-python3} stamp=$_root/.venv/ready files=(requirements.txt ${ENV:-}) want
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || {
        echo "error: $("$python" --version 2>&1) is not supported: set PYTHON to a Python 3.11 or 3.12" >&2
        return 1
    }
    cd "$_root"
    want=$("$python" --version; cat constraints.txt requirements*.txt setup.py)
    if [[ ! -f $stamp || $(cat "$stamp") != "$want" ]]; then
        rm -rf .venv
        echo "Installing the pinned dependencies into .venv (some minutes, once) ..."
        "$python" -m venv .venv
        .venv/bin/pip install --quiet --upgrade pip
        # fairseq is built from source where there is no wheel. An isolated build would fetch another torch,
        # so what the build needs is installed first.
        .venv/bin/pip install --quiet -c constraints.txt torch numpy cython setuptools wheel
        .venv/bin/pip install --quiet -c constraints.txt --no-build-isolation fairseq-fixed
        .venv/bin/pip install --quiet -c constraints.txt -r requirements.txt
        # The command xmoe, running the code of this folder.
        .venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .
        printf '%s' "$want" > "$stamp"
    fi
    # Installs nothing where it is all there.
    local file
    for file in "${files[@]:1}"; do
        .venv/bin/pip install --quiet -c constraints.txt -r "$file"
    done
}

_make_env || exit 1
# shellcheck disable=SC1091
source "$_root/.venv/bin/activate"
export PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}

# whole NAME LEAST: refuses a variable that is no whole number from LEAST on.
whole() {
    if [[ ! ${!1} =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2)); then
        echo "error: $1 is '${!1}': give a whole number from $2 on" >&2
        exit 1
    fi
}

# same_settings FOLDER TEXT: notes the settings of a run, and refuses to go on with a run made with others.
same_settings() {
    local file=$1/settings.txt
    mkdir -p "$1"
    if [[ -e $file && ! -f $file ]]; then
        echo "error: $file is no file: choose another folder or remove it" >&2
        exit 1
    elif [[ ! -f $file ]]; then
        printf '%s\n' "$2" > "$file.tmp"
        mv "$file.tmp" "$file"
    elif [[ $(cat "$file") != "$2" ]]; then
        echo "error: $1 was made with other settings ($(cat "$file")), now they are ($2): choose another folder or delete it" >&2
        exit 1
    fi
}
