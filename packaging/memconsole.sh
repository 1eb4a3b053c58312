#!/bin/sh
exec /usr/lib/memconsole/bin/python3 -P -m memconsole "$@"
