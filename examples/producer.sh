#!/usr/bin/env bash
# Publish the load of this machine and its number of processes, once a second, for dashboard.html.
#
# Run it, in the folder of sse_server.py, while the server runs with --publish-token SECRET:
#     SSE_PUBLISH_TOKEN=SECRET bash examples/producer.sh
set -euo pipefail

publish() {    # publish CHANNEL DATA
  # The token comes from a file, because everybody can see a command line.
  local answer
  answer=$(curl --silent --show-error --fail-with-body --max-time 5 \
    --header @<(printf 'Authorization: Bearer %s' "$SSE_PUBLISH_TOKEN") \
    --data-binary "$2" "http://127.0.0.1:6500/?channel=$1&event=$1") || echo "not published${answer:+: $answer}" >&2
}

while true; do
  read -r load _ < <(LC_ALL=C uptime | sed 's/.*averages*: *//; s/,/ /')
  publish load "$load"
  publish processes "$(ps -e | tail -n +2 | wc -l)"
  sleep 1
done
