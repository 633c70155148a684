# To be sourced, with $bin, an environment's folder of commands, and $here, this folder: uv as
# installer.lock pins it, looking for packages where pip is configured to look.

pinned=$(sed -n 's/^uv==\([^ ]*\).*/\1/p' "$here/installer.lock")
if ! "$bin/uv" --version 2>/dev/null | grep -qF "uv $pinned "; then
    "$bin/pip" install --quiet --quiet --require-hashes --requirement "$here/installer.lock"
fi

# uv does not read pip's settings. pip lists PIP_* before its files, and separates the values of
# one option by white space, uv by commas.
settings=$("$bin/pip" config list)
for pair in UV_DEFAULT_INDEX=index-url UV_FIND_LINKS=find-links SSL_CERT_FILE=cert ALL_PROXY=proxy
do
    value=$(printf '%s\n' "$settings" | sed -n "s/^[^=]*\.${pair#*=}='\(.*\)'\$/\1/p" | head -n 1 |
        sed 's/\\n/ /g; s/^ *//; s/ *$//; s/  */,/g')
    if [ -n "$value" ] && ! printenv "${pair%%=*}" >/dev/null; then
        export "${pair%%=*}=$value"
    fi
done

uv() {
    command=$1
    shift
    "$bin/uv" pip "$command" --python "$bin/python" "$@"
}
