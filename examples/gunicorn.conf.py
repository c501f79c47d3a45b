"""What gunicorn needs to run flask_in_workers.py: it starts the server in every worker.

Run it, in the folder of sse_server.py:
    pip install flask gunicorn
    gunicorn --config examples/gunicorn.conf.py examples.flask_in_workers:app
"""
bind = "127.0.0.1:8000"
workers = 2


def post_fork(server, worker):
    """Gunicorn calls this in each new worker. Threads that start here belong to that worker."""
    from examples.flask_in_workers import start_events
    start_events()
