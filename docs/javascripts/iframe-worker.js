// The search of the site runs in a worker, which browsers do not start from the file system. There a hidden frame takes
// its place.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    const inside = frame.contentWindow;
    const loaded = (address) =>
      new Promise((resolve) => {
        const script = inside.document.createElement("script");
        script.src = new URL(address, document.baseURI).href;
        script.onload = script.onerror = resolve;
        inside.document.body.append(script);
      });
    inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    inside.importScripts = (...addresses) => Promise.all(addresses.map(loaded));
    this.frame = frame;
    this.ready = loaded(url);
  }

  postMessage(data) {
    const event = new MessageEvent("message", { data });
    this.ready.then(() => this.frame.contentWindow.dispatchEvent(event));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
