#!/usr/bin/env bash
# A job for cron that says how far it is. The page progress.html shows it.
#
# Run it, in the folder of sse_server.py, while the server runs with --publish-token SECRET:
#     SSE_PUBLISH_TOKEN=SECRET bash examples/job.sh
set -euo pipefail
: "${SSE_PUBLISH_TOKEN:?set it to the publish token of the server}"

publish() {    # publish DATA: try for half a minute, and let the job go on in any case
  # The token comes from a file, because everybody can see a command line.
  local answer
  answer=$(curl --silent --show-error --fail-with-body --max-time 5 \
    --retry 10 --retry-connrefused --retry-max-time 30 \
    --header @<(printf 'Authorization: Bearer %s' "$SSE_PUBLISH_TOKEN") \
    --data-binary "$1" 'http://127.0.0.1:6500/?channel=job&event=progress') || echo "not published${answer:+: $answer}" >&2
}

steps=(collect compress copy check clean)
for number in "${!steps[@]}"; do
  publish "{\"done\": $number, \"of\": ${#steps[@]}, \"step\": \"${steps[$number]}\"}"
  sleep "${STEP_TIME:-2}"    # the work
done
publish "{\"done\": ${#steps[@]}, \"of\": ${#steps[@]}, \"step\": \"finished\"}"
