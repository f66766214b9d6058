#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# HAProxy's external check of a PING health monitor: one echo request to the member.
# HAProxy sets HAPROXY_SERVER_ADDR and gives no PATH ("external-check command" in its manual).

exec /bin/ping -n -q -c 1 -w 1 "$HAPROXY_SERVER_ADDR" > /dev/null 2>&1
