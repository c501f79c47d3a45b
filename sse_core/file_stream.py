class FileStream: pass
