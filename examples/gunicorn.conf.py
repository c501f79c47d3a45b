"""What gunicorn needs to run flask_in_workers.py: it starts the server in every worker.

Run it, in the folder of sse_server.py:
    pip install flask gunicorn
    gunicorn --config examples/gunicorn.conf.py examples.flask_in_workers:app
"""
bind = "127.0.0.1:8000"
workers = 2


def post_worker_init(worker):
    """Gunicorn calls this in each worker that is ready. Threads that start here belong to it.

    The hook post_fork comes too early: the worker may still have the rights of root, which the
    history file would belong to, and it does not hear a SIGTERM yet.
    """
    from examples.flask_in_workers import start_events
    start_events()
