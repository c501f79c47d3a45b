# Varnish in front of one server. Try it in this folder:
# varnishd -F -n /tmp/sse-varnish -a 127.0.0.1:6500 -f "$PWD/varnish.vcl"
#
# A stream takes two threads of thread_pool_max. What a slow client does not take stays in memory, without
# a bound: from Varnish 7.3 on, -p transit_buffer=64k is one
vcl 4.1;

backend default {
    .host = "127.0.0.1";
    .port = "6501";
    # More than --heartbeat is enough
    .between_bytes_timeout = 1h;
}

sub vcl_recv {
    # There is nothing to cache, and no client has to wait for the answer of another.
    # (With pipe instead, a client would get no answer at all while no server is there.)
    return (pass);
}

# An EventSource gives up for good at any status but 200. While no server is there, it gets one that
# lets it come back
sub vcl_backend_error {
    if (bereq.method == "GET" && bereq.http.Accept ~ "text/event-stream") {
        set beresp.status = 200;
        set beresp.http.Content-Type = "text/event-stream; charset=utf-8";
        set beresp.http.Cache-Control = "no-cache";
        set beresp.http.Access-Control-Allow-Origin = "*";
        synthetic({"event: busy
retry: 1000
data: {"retry": 1}

"});
        return (deliver);
    }
}
