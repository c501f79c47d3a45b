class FileStream:
    def __init__(self, path, history, sync):
        pass
