#!/bin/sh
# `worker` takes jobs from Runpod; anything else is a command of dust3r-sfm: reconstruct, view, ...
set -e
if [ "$1" = worker ]; then
    shift
    exec python /opt/dust3r_sfm/handler.py "$@"
fi
exec dust3r-sfm "$@"
