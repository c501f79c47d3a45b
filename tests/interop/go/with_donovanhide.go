// github.com/donovanhide/eventsource, as Debian has it. It reconnects by itself.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/donovanhide/eventsource"
)

func say(line map[string]string) {
	text, _ := json.Marshal(line)
	fmt.Println(string(text))
}

func main() {
	stream, err := eventsource.Subscribe(os.Args[1], "")
	if err != nil {
		say(map[string]string{"closed": err.Error()})
		return
	}
	for {
		select {
		case event, open := <-stream.Events:
			if !open {
				// Closed below: it must stay so while this program lives.
				select {}
			}
			name := event.Event()
			if name == "" {
				name = "message"
			}
			say(map[string]string{"event": name, "data": event.Data(), "id": event.Id()})
			if event.Data() == "close yourself" {
				stream.Close()
				say(map[string]string{"closed": "by itself"})
			}
		case err := <-stream.Errors:
			var refused eventsource.SubscriptionError
			if errors.As(err, &refused) && (refused.Code == 204 || refused.Code == 401) {
				// It would come back for ever; a user has to end it.
				stream.Close()
				say(map[string]string{"closed": err.Error()})
			} else if err != nil {
				say(map[string]string{"error": err.Error()})
			}
		}
	}
}
